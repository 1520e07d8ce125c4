"""Exceptions to a plan that may mend a node: from the node alone over what belongs to it to whole modules."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir

from trtforge.converter.overflow import overflow_rules
from trtforge.runtime.graph import META_ORIGIN, OnnxModel, load_graph, node_refs
from trtforge.runtime.precision import QUANTIZED, NodeRef, Origin, Precision, PrecisionPlan, Rule
from trtforge.runtime.runner import Tensors
from trtforge.validation.cuts import constant_nodes
from trtforge.validation.kinds import Symptom

__all__ = ["Mend", "propose"]

_SMALL = 48
"""Nodes of a module that is put back as a whole before its parts are picked out: a norm, an attention block."""
_REACH = 4
"""How many steps up from a node that cancels its inputs are followed."""


@dataclass(frozen=True, slots=True)
class Mend:
    """Rules for a plan, and the ids of the nodes that they select."""

    rules: tuple[Rule, ...]
    nodes: frozenset[str]


def propose(
    reference: OnnxModel,
    plan: PrecisionPlan,
    culprits: Sequence[str],
    symptom: Symptom,
    samples: Sequence[Tensors],
) -> Iterator[Mend]:
    """Exceptions worth measuring, the narrowest first; none twice, none that changes nothing.

    Args:
        reference: The float graph.
        plan: What the candidate was made by.
        culprits: Ids of the nodes to blame.
        symptom: What is wrong with them.
        samples: Inputs, for what overflows around them.
    """
    graph = load_graph(reference.path)
    refs = node_refs(graph)
    known = {ref.id: ref for ref in refs}
    assigned = plan.resolve(refs, graph=reference.hash)
    nodes = [name for name in culprits if name in known]
    precisions: list[Precision] = ["fp32"]
    if any(assigned[name].precision in QUANTIZED for name in nodes) and plan.float_default != "fp32":
        precisions.insert(0, plan.float_default)
    origin: Origin = "overflow" if symptom.kind in ("overflow", "underflow") else "accuracy"
    seen = set()
    for precision in precisions:
        for chosen, module in _widen(graph, reference, plan, nodes, symptom, samples, refs):
            changed = {name for name in chosen if assigned[name].precision != precision}
            key = precision, frozenset(chosen)
            if not changed or key in seen:
                continue
            seen.add(key)
            if module is not None:
                rules = [Rule(precision, module=module, origin=origin, reason=symptom.reason)]
            else:
                rules = list(_rules(chosen, refs, precision, origin, symptom.reason))
            yield Mend(tuple(rules), frozenset(chosen))


def _widen(
    graph: ir.Model,
    reference: OnnxModel,
    plan: PrecisionPlan,
    culprits: Sequence[str],
    symptom: Symptom,
    samples: Sequence[Tensors],
    refs: Sequence[NodeRef],
) -> Iterator[tuple[frozenset[str], str | None]]:
    """Sets of nodes that grow, each with the module that selects it, if one does."""
    known = {ref.id: ref for ref in refs}
    yield frozenset(culprits), None
    modules = [known[name].module for name in culprits]
    module = modules[0] if modules and modules[0] and len(set(modules)) == 1 else ""
    inside = _in_module(refs, module)
    if module and len(inside) <= _SMALL:
        yield inside, module
    if symptom.kind in ("overflow", "underflow"):
        flagged = {rule.id or "" for rule in overflow_rules(reference, samples, replace(plan, overflow_guard=True))}
        yield _connected(graph, culprits, flagged), None
    else:
        chosen = set(culprits)
        for _ in range(_REACH):
            chosen |= _producers(graph, chosen)
            yield frozenset(chosen & known.keys()), None
    while module:
        if len(inside := _in_module(refs, module)) > len(refs) // 2:
            return
        yield inside, module
        module = module.rpartition(".")[0]


def _in_module(refs: Sequence[NodeRef], module: str) -> frozenset[str]:
    rule = Rule("fp32", module=module)
    return frozenset(ref.id for ref in refs if module and rule.matches(ref))


def _producers(graph: ir.Model, names: Collection[str]) -> set[str]:
    constant = constant_nodes(graph)
    found: set[str] = set()
    for node in graph.graph:
        if node.name in names:
            makers = (value.producer() for value in node.inputs if value is not None)
            found.update(maker.name or "" for maker in makers if maker is not None and maker not in constant)
    return found


def _connected(graph: ir.Model, culprits: Sequence[str], flagged: set[str]) -> frozenset[str]:
    """Those of the flagged nodes that hang together with the culprits."""
    members = [node for node in graph.graph if node.name in flagged or node.name in culprits]
    neighbours = {node: {*node.predecessors(), *node.successors()} for node in members}
    chosen = {node for node in members if node.name in culprits}
    stack = list(chosen)
    while stack:
        for other in neighbours[stack.pop()] & neighbours.keys() - chosen:
            chosen.add(other)
            stack.append(other)
    return frozenset(node.name or "" for node in chosen if META_ORIGIN not in node.metadata_props)


def _rules(
    chosen: Collection[str], refs: Sequence[NodeRef], precision: Precision, origin: Origin, reason: str
) -> Iterator[Rule]:
    """One rule a node: by module and operator, which hold anywhere, where those select nothing else; else by id."""
    given = set()
    for ref in refs:
        if ref.id not in chosen:
            continue
        rule = Rule(precision, module=ref.module, op=ref.op, origin=origin, reason=reason)
        if not ref.module or any(other.id not in chosen for other in refs if rule.matches(other)):
            rule = replace(rule, module=None, op=None, id=ref.id)
        if rule not in given:
            given.add(rule)
            yield rule
