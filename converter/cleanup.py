"""Makes a graph plain: no functions, no dead or doubled parts, no constants as nodes, and what TensorRT's parser needs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from trtforge.runtime.graph import all_graphs

__all__ = ["clean"]


def clean(model: ir.Model) -> None:
    """Cleans in place.

    Ensures: names of inputs and outputs, and results, are as before.
    """
    passes: list[ir.passes.PassBase] = [
        common.InlinePass(),
        common.RemoveInitializersFromInputsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.IdentityEliminationPass(),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    ]
    for step in passes:
        step(model)
    for graph in all_graphs(model):
        for node in graph:
            if node.op_type == "Einsum" and node.domain == "":
                _plain_einsum(node)


def _plain_einsum(node: ir.Node) -> None:
    pass
