from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.precision import NodeRef, PrecisionPlan, Rule

PRECISIONS = ["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
ORIGINS = ["user", "overflow", "sensitivity", "accuracy", "type"]
NODES = [
    NodeRef("stem/Conv#0", "Conv", "stem"),
    NodeRef("layers.0.attn/Softmax#0", "Softmax", "layers.0.attn"),
    NodeRef("layers.0.mlp.fc1/Gemm#0", "Gemm", "layers.0.mlp.fc1"),
    NodeRef("layers.1.attn/Softmax#0", "Softmax", "layers.1.attn"),
    NodeRef("layers.10.attn/Softmax#0", "Softmax", "layers.10.attn"),
    NodeRef("/Add#0", "Add", ""),
]

text = st.text(min_size=1, max_size=12)
precision: Any = st.sampled_from(PRECISIONS)
selectors = st.fixed_dictionaries({}, optional={"module": text, "op": text, "id": text}).filter(bool)
rules = st.builds(
    lambda chosen, p, origin, reason: Rule(p, **chosen, origin=origin, reason=reason),
    selectors,
    precision,
    st.sampled_from(ORIGINS),
    st.text(max_size=20),
)
plans = st.builds(
    PrecisionPlan,
    default=precision,
    rules=st.lists(rules, max_size=5).map(tuple),
    base=st.sampled_from(PRECISIONS[:4]),
    graph=st.none() | st.text(string.hexdigits, min_size=64, max_size=64),
    keep_io=st.booleans(),
)


def precisions(plan: PrecisionPlan, nodes: list[NodeRef] = NODES) -> dict[str, str]:
    return {node: assignment.precision for node, assignment in plan.resolve(nodes).items()}


@settings(max_examples=200, deadline=None)
@given(plans)
@example(PrecisionPlan(rules=(Rule("fp16", op="Conv", reason="\x85S÷"),)))
def test_yaml_reads_back_equal(plan: PrecisionPlan) -> None:
    again = PrecisionPlan.from_yaml(plan.to_yaml())
    if not plan.quantizes:
        assert again.base == PrecisionPlan().base  # means nothing, so it is not written
        again = PrecisionPlan(again.default, again.rules, plan.base, again.graph, again.keep_io)
    assert again == plan
    assert again.to_yaml() == plan.to_yaml()


@given(plans)
def test_yaml_has_no_aliases_tags_or_wrapped_surprises(plan: PrecisionPlan) -> None:
    data = yaml.safe_load(plan.to_yaml())
    assert data["version"] == 1
    assert PrecisionPlan.from_data(data) == PrecisionPlan.from_yaml(plan.to_yaml())


@given(st.lists(st.tuples(st.sampled_from(NODES), precision), max_size=8), precision)
def test_the_last_matching_rule_wins(choices: list[tuple[NodeRef, Any]], default: Any) -> None:
    plan = PrecisionPlan(default, tuple(Rule(p, id=node.id) for node, p in choices))
    expected = dict.fromkeys((node.id for node in NODES), default) | {node.id: p for node, p in choices}
    assert precisions(plan) == expected


@given(plans, st.lists(rules, max_size=3))
def test_more_rules_come_after(plan: PrecisionPlan, more: list[Rule]) -> None:
    longer = plan.with_rules(more)
    assert longer.rules == (*plan.rules, *more)
    assert (longer.default, longer.base, longer.graph, longer.keep_io) == (
        plan.default, plan.base, plan.graph, plan.keep_io,
    )  # fmt: skip
    assert plan.with_rules([], graph="f" * 64).graph == "f" * 64


@pytest.mark.parametrize(
    ("rule", "matched"),
    [
        (Rule("fp32", module="stem"), {"stem/Conv#0"}),
        (Rule("fp32", module="layers.1"), {"layers.1.attn/Softmax#0"}),
        (Rule("fp32", module="layers.?"), {"layers.0.attn/Softmax#0", "layers.0.mlp.fc1/Gemm#0",
                                           "layers.1.attn/Softmax#0"}),
        (Rule("fp32", module="layers.*.attn"), {"layers.0.attn/Softmax#0", "layers.1.attn/Softmax#0",
                                                "layers.10.attn/Softmax#0"}),
        (Rule("fp32", module="layers.0.mlp"), {"layers.0.mlp.fc1/Gemm#0"}),
        (Rule("fp32", module="*.mlp"), {"layers.0.mlp.fc1/Gemm#0"}),
        (Rule("fp32", module=""), {"/Add#0"}),
        (Rule("fp32", op="S*"), {"layers.0.attn/Softmax#0", "layers.1.attn/Softmax#0", "layers.10.attn/Softmax#0"}),
        (Rule("fp32", op="Softmax", module="layers.1"), {"layers.1.attn/Softmax#0"}),
        (Rule("fp32", id="*/Gemm#0"), {"layers.0.mlp.fc1/Gemm#0"}),
    ],
    ids=lambda value: value.describe() if isinstance(value, Rule) else "",
)  # fmt: skip
def test_selectors(rule: Rule, matched: set[str]) -> None:
    assert {node.id for node in NODES if rule.matches(node)} == matched


def test_an_id_with_brackets_selects_itself() -> None:
    node = NodeRef("x[0]/Add#0", "Add", "x[0]")
    assert Rule("fp32", id="x[0]/Add#0").matches(node)


def test_assignments_say_who_and_why() -> None:
    rule = Rule("fp32", op="Softmax", origin="overflow", reason="its input reaches 1e6")
    resolved = PrecisionPlan("fp16", (rule,)).resolve(NODES)
    chosen = resolved["layers.1.attn/Softmax#0"]
    assert (chosen.precision, chosen.origin, chosen.reason, chosen.rule) == ("fp32", "overflow", rule.reason, rule)
    default = resolved["stem/Conv#0"]
    assert (default.precision, default.origin, default.reason, default.rule) == ("fp16", None, "", None)


def test_the_float_around_quantized_nodes() -> None:
    assert PrecisionPlan("fp16").float_default == "fp16"
    assert PrecisionPlan("int8").float_default == "fp16"
    assert PrecisionPlan("int8", base="bf16").float_default == "bf16"
    assert PrecisionPlan("fp32", (Rule("int8", op="Conv"),)).float_default == "fp32"
    assert not PrecisionPlan("fp16").quantizes
    assert PrecisionPlan("fp8").quantizes
    assert PrecisionPlan("fp32", (Rule("int8", op="Conv"),)).quantizes


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule("fp32", op="Softmx"), "no operator 'Softmx'; did you mean 'Softmax'"),
        (Rule("fp32", module="layer.0"), "no such module; did you mean 'layers"),
        (Rule("fp32", id="stem/Conv#1"), "nearest ids: did you mean 'stem/Conv#0'"),
        (Rule("fp32", op="Conv", module="layers.0"), "match no node together"),
    ],
)
def test_a_rule_that_matches_nothing_is_an_error(rule: Rule, message: str) -> None:
    with pytest.raises(ConfigError, match="matches no node") as caught:
        PrecisionPlan("fp16", (Rule("bf16", op="Conv"), rule)).resolve(NODES)
    assert message in caught.value.why


def test_ids_hold_for_one_graph() -> None:
    plan = PrecisionPlan("fp16", (Rule("fp32", id="stem/Conv#0"),), graph="a" * 64)
    assert plan.resolve(NODES, graph="a" * 64)["stem/Conv#0"].precision == "fp32"
    assert plan.resolve(NODES)["stem/Conv#0"].precision == "fp32"
    with pytest.raises(ConfigError, match=f"graph {'a' * 12}, this graph is {'b' * 12}"):
        plan.resolve(NODES, graph="b" * 64)
    anywhere = PrecisionPlan("fp16", (Rule("fp32", module="stem"),), graph="a" * 64)
    assert anywhere.resolve(NODES, graph="b" * 64)["stem/Conv#0"].precision == "fp32"


def test_a_name_alone_is_a_plan() -> None:
    assert PrecisionPlan.from_data("bf16") == PrecisionPlan("bf16")
    assert PrecisionPlan.from_yaml("fp8") == PrecisionPlan("fp8")
    assert PrecisionPlan.from_yaml("{default: fp16, rules: [{op: Softmax, precision: fp32}]}") == PrecisionPlan(
        "fp16", (Rule("fp32", op="Softmax"),)
    )


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ("fp61", "'fp61'"),
        ("{default: fp61}", "did you mean 'fp16'"),
        ("{defualt: fp16}", "unknown key 'defualt'"),
        ("{base: int8}", "base is 'int8'"),
        ("[fp16]", "plan.yaml is list"),
        ("{version: 2}", "has version 2"),
        ("{keep_io: 3}", "keep_io is 3"),
        ("{graph: 3}", "graph is 3"),
        ("{rules: fp16}", "rules is str"),
        ("{rules: [fp16]}", r"rules\[0\] is str"),
        ("{rules: [{op: Conv}]}", "has no `precision`"),
        ("{rules: [{precision: fp16}]}", "selects nothing"),
        ("{rules: [{op: 3, precision: fp16}]}", "op is 3, not text"),
        ("{rules: [{op: Conv, precision: half}]}", "precision is 'half'"),
        ("{rules: [{op: Conv, precision: fp16, origin: me}]}", "origin is 'me'"),
        ("{rules: [{opp: Conv, precision: fp16}]}", "unknown key 'opp'"),
        ("{a: [", "is not YAML"),
    ],
)
def test_what_is_wrong_in_a_file_is_named(document: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(document)
    with pytest.raises(ConfigError, match=message):
        PrecisionPlan.load(path)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the precision plan"):
        PrecisionPlan.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"\xe9")
    with pytest.raises(ConfigError, match="cannot read the precision plan"):
        PrecisionPlan.load(tmp_path / "latin.yaml")
