"""The precision plan: which precision each node of a graph runs in, and why. Data and YAML; it touches no graph."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import yaml

from trtforge.runtime.errors import ConfigError
from trtforge.runtime.suggest import nearest

__all__ = ["Assignment", "NodeRef", "Origin", "Precision", "PrecisionPlan", "Rule"]

Precision = Literal["fp32", "tf32", "fp16", "bf16", "int8", "fp8"]
Origin = Literal["user", "overflow", "sensitivity", "accuracy", "type"]
"""Who asked for a rule: the user, the overflow guard, measured sensitivity, the accuracy search, or operator types."""

PRECISIONS: tuple[str, ...] = get_args(Precision)
ORIGINS: tuple[str, ...] = get_args(Origin)
QUANTIZED: frozenset[str] = frozenset({"int8", "fp8"})
SCHEMA = 1

_ALIASES = {"float32": "fp32", "float": "fp32", "float16": "fp16", "half": "fp16", "bfloat16": "bf16"}
"""What other libraries call them."""


@dataclass(frozen=True, slots=True)
class NodeRef:
    """A node as rules see it: id (`<module>/<OpType>#k`), operator type and dotted module path ("" at the root)."""

    id: str
    op: str
    module: str


@dataclass(frozen=True, slots=True)
class Rule:
    """Nodes that match every selector given run in `precision`; of several rules that match, the last one wins.

    Attributes:
        precision: What the matched nodes run in.
        module: Glob over dotted module paths; it also selects everything below the modules that it matches.
        op: Glob over ONNX operator types.
        id: Glob over node ids; holds only for the graph that the plan's `graph` names.
        origin: Who asked for it.
        reason: Why, for people.
    """

    precision: Precision
    module: str | None = None
    op: str | None = None
    id: str | None = None
    origin: Origin = "user"
    reason: str = ""

    def __post_init__(self) -> None:
        _check_choice("precision", self.precision, PRECISIONS)
        _check_choice("origin", self.origin, ORIGINS)
        if self.module is None and self.op is None and self.id is None:
            raise ConfigError(
                f"precision rule {{precision: {self.precision}}} selects nothing",
                fix="give it a `module`, an `op` or an `id`, or make it the plan's `default`",
            )

    def matches(self, node: NodeRef) -> bool:
        """Whether every selector that is given matches `node`."""
        if self.op is not None and not fnmatch.fnmatchcase(node.op, self.op):
            return False
        if self.id is not None and node.id != self.id and not fnmatch.fnmatchcase(node.id, self.id):
            return False
        return self.module is None or _module_matches(self.module, node.module)

    def describe(self) -> str:
        """The selectors and precision on one line, as YAML writes them."""
        chosen = {"module": self.module, "op": self.op, "id": self.id}
        return ", ".join(f"{k}: {v}" for k, v in {**chosen, "precision": self.precision}.items() if v is not None)


@dataclass(frozen=True, slots=True)
class Assignment:
    """The precision of one node, who asked for it and why; `rule` is None where the plan's default applies."""

    precision: Precision
    origin: Origin | None
    reason: str
    rule: Rule | None


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """A default precision and its exceptions.

    Attributes:
        default: The precision of every node that no rule matches.
        rules: Exceptions, in order; the last match wins.
        base: The float precision around quantized nodes, and of nodes that a quantized default cannot apply to.
        graph: Hash of the graph that ids in rules refer to; None where no rule uses an id.
        keep_io: Graph inputs and outputs keep their float32 types; casts stand inside.
        overflow_guard: Whether nodes that would overflow float16 on the golden samples get a rule for fp32.
    """

    default: Precision = "fp32"
    rules: tuple[Rule, ...] = ()
    base: Precision = "fp16"
    graph: str | None = None
    keep_io: bool = True
    overflow_guard: bool = True

    def __post_init__(self) -> None:
        _check_choice("default", self.default, PRECISIONS)
        _check_choice("base", self.base, tuple(p for p in PRECISIONS if p not in QUANTIZED))

    @property
    def float_default(self) -> Precision:
        """What float nodes run in where nothing else is said: `default`, or `base` under a quantized default."""
        return self.base if self.default in QUANTIZED else self.default

    @property
    def quantizes(self) -> bool:
        """Whether any node may be quantized, so that ranges are needed."""
        return self.default in QUANTIZED or any(rule.precision in QUANTIZED for rule in self.rules)

    def with_rules(self, rules: Iterable[Rule], *, graph: str | None = None) -> PrecisionPlan:
        """This plan with more rules after its own, and the graph their ids refer to."""
        return replace(self, rules=(*self.rules, *rules), graph=graph or self.graph)

    def resolve(self, nodes: Iterable[NodeRef], *, graph: str | None = None) -> dict[str, Assignment]:
        """The assignment of every node, by id.

        Args:
            nodes: The nodes of the graph.
            graph: Hash of that graph, checked against the plan's where a rule selects by id.

        Raises:
            ConfigError: a rule of the user's that matches no node, or ids that belong to another graph.
        """
        nodes = list(nodes)
        by_id = [rule for rule in self.rules if rule.id is not None]
        if by_id and self.graph and graph and self.graph != graph:
            raise ConfigError(
                f"the plan's ids belong to graph {self.graph[:12]}, this graph is {graph[:12]}",
                why=f"rule `{by_id[0].describe()}` selects by id, and ids hold for one graph only",
                fix="make the plan again for this model, or select by `module` or `op`, which hold anywhere",
            )
        matched: set[int] = set()
        out: dict[str, Assignment] = {}
        for node in nodes:
            found = Assignment(self.default, None, "", None)
            for index, rule in enumerate(self.rules):
                if rule.matches(node):
                    matched.add(index)
                    found = Assignment(rule.precision, rule.origin, rule.reason, rule)
            out[node.id] = found
        for index, rule in enumerate(self.rules):
            if index not in matched:
                raise ConfigError(
                    f"precision rule `{rule.describe()}` matches no node of the graph",
                    why=_why_unmatched(rule, nodes),
                    fix="correct the selector, or remove the rule; `trtforge inspect` lists modules and operators",
                )
        return out

    def to_yaml(self) -> str:
        """The plan as text that `from_yaml` reads back equal."""
        data: dict[str, Any] = {"version": SCHEMA, "default": self.default}
        if self.quantizes:
            data["base"] = self.base
        if not self.keep_io:
            data["keep_io"] = False
        if not self.overflow_guard:
            data["overflow_guard"] = False
        if self.graph:
            data["graph"] = self.graph
        if self.rules:
            data["rules"] = [_rule_data(rule) for rule in self.rules]
        text = str(yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120))
        if yaml.safe_load(text) != data:  # PyYAML loses U+0085, a line break to YAML, unless it writes plain ASCII
            text = str(yaml.safe_dump(data, sort_keys=False, width=120))
        return text

    @classmethod
    def from_yaml(cls, text: str, *, name: str = "plan") -> PrecisionPlan:
        """Reads a plan.

        Args:
            text: YAML.
            name: What errors call it, usually its path.

        Raises:
            ConfigError: not YAML, an unknown key or value, another schema version.
        """
        try:
            data = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{name} is not YAML: {error}") from error
        return cls.from_data(data, name=name)

    @classmethod
    def from_data(cls, data: object, *, name: str = "plan", others: Sequence[str] = ()) -> PrecisionPlan:
        """A plan from parsed YAML: a mapping, or one precision's name. Raises as `from_yaml` does.

        `others` are names that the caller takes besides, for the error's text.
        """
        if isinstance(data, str):
            if data not in PRECISIONS:
                meant = _ALIASES.get(data.lower().removeprefix("torch."), data)
                raise ConfigError(f"{name} is {data!r}", fix=nearest(meant, (*PRECISIONS, *others)))
            return cls(default=cast("Precision", data))
        if not isinstance(data, Mapping):
            raise ConfigError(f"{name} is {type(data).__name__}, not a precision or a mapping of default and rules")
        _check_keys(name, data, {"version", "default", "base", "graph", "keep_io", "overflow_guard", "rules"})
        if data.get("version", SCHEMA) != SCHEMA:
            raise ConfigError(f"{name} has version {data['version']!r}; this trtforge reads version {SCHEMA}")
        rules = data.get("rules") or []
        if not isinstance(rules, Sequence) or isinstance(rules, str):
            raise ConfigError(f"{name}: rules is {type(rules).__name__}, not a list")
        switches = {key: data.get(key, True) for key in ("keep_io", "overflow_guard")}
        for key, value in switches.items():
            if not isinstance(value, bool):
                raise ConfigError(f"{name}: {key} is {value!r}, not true or false")
        graph = data.get("graph")
        if graph is not None and not isinstance(graph, str):
            raise ConfigError(f"{name}: graph is {graph!r}, not a hash")
        return cls(
            default=data.get("default", "fp32"),
            rules=tuple(_read_rule(f"{name}: rules[{i}]", rule) for i, rule in enumerate(rules)),
            base=data.get("base", "fp16"),
            graph=graph,
            **switches,
        )

    def save(self, path: Path) -> None:
        """Writes the plan's file. Raises `ConfigError` where it cannot."""
        try:
            path.write_text(self.to_yaml(), encoding="utf-8", newline="\n")
        except OSError as error:
            raise ConfigError(f"cannot write the precision plan {path}: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> PrecisionPlan:
        """Reads a plan's file. Raises `ConfigError` as `from_yaml` does, and where the file cannot be read."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the precision plan {path}: {error}") from error
        return cls.from_yaml(text, name=str(path))


def _module_matches(pattern: str, module: str) -> bool:
    if pattern == "":
        return module == ""
    if fnmatch.fnmatchcase(module, pattern):
        return True
    parts = module.split(".")
    return any(fnmatch.fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts)))


def _rule_data(rule: Rule) -> dict[str, str]:
    selectors = {"module": rule.module, "op": rule.op, "id": rule.id}
    data = {key: value for key, value in selectors.items() if value is not None}
    data["precision"] = rule.precision
    if rule.origin != "user":
        data["origin"] = rule.origin
    if rule.reason:
        data["reason"] = rule.reason
    return data


def _read_rule(name: str, data: object) -> Rule:
    if not isinstance(data, Mapping):
        raise ConfigError(f"{name} is {type(data).__name__}, not a mapping")
    _check_keys(name, data, {"module", "op", "id", "precision", "origin", "reason"})
    if "precision" not in data:
        raise ConfigError(f"{name} has no `precision`", fix=f"one of {', '.join(PRECISIONS)}")
    for key, value in data.items():
        if not isinstance(value, str):
            raise ConfigError(f"{name}: {key} is {value!r}, not text")
    return Rule(**data)


def _check_keys(name: str, data: Mapping[Any, Any], known: set[str]) -> None:
    for key in data:
        if key not in known:
            raise ConfigError(f"{name}: unknown key {key!r}", fix=nearest(str(key), known))


def _check_choice(name: str, value: Any, choices: Sequence[str]) -> Any:
    if not isinstance(value, str) or value not in choices:
        raise ConfigError(f"{name} is {value!r}", fix=nearest(str(value), choices))
    return value


def _why_unmatched(rule: Rule, nodes: list[NodeRef]) -> str:
    if rule.id is not None:
        return f"nearest ids: {nearest(rule.id, {node.id for node in nodes})}"
    if rule.op is not None and not any(fnmatch.fnmatchcase(node.op, rule.op) for node in nodes):
        return f"no operator {rule.op!r}; {nearest(rule.op, {node.op for node in nodes})}"
    if rule.module is not None and not any(_module_matches(rule.module, node.module) for node in nodes):
        return f"no such module; {nearest(rule.module, {node.module for node in nodes if node.module})}"
    return "its selectors match no node together"
