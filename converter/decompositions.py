"""Operators that torch.onnx translates not at all, or into what no engine takes, expressed through other ones of torch.

They are replaced in the captured program, before its translation, so that the user's lines and modules stay on them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

__all__ = ["decompose"]

aten = torch.ops.aten

_SELECTED_BELOW = 25
"""Up to so many rows torch's `cdist` subtracts, and above it multiplies matrices."""


def decompose(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """The program with `median`, `cdist` and assignments through boolean masks expressed otherwise; else as it is."""
    found = {
        node.target
        for part in program.graph_module.modules()
        for node in getattr(part, "graph", torch.fx.Graph()).nodes
        if node.target in _TABLE and (node.target not in _MASKED or _has_mask(node))
    }
    if not found:
        return program
    if found & _MASKED:  # writing in place becomes the other one before the table is asked
        found |= _MASKED
    # Operators that are not in the table stay as they are, also those that torch would take apart of its own accord.
    table = {operator: _TABLE[operator] for operator in found}
    decomposed: torch.export.ExportedProgram = program.run_decompositions(table)
    return decomposed


def _has_mask(node: torch.fx.Node) -> bool:
    indices = node.args[1]
    assert isinstance(indices, Sequence)
    values = [index.meta.get("val") for index in indices if isinstance(index, torch.fx.Node)]
    return any(isinstance(value, torch.Tensor) and value.dtype == torch.bool for value in values)


def _median_of_axis(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower of the two middle values, as torch defines it; which of equal ones the index names is left open."""
    count = x.shape[dim]
    values, indices = torch.topk(x, (count + 1) // 2, dim=dim, largest=False, sorted=True)
    last = (values.narrow(dim, -1, 1), indices.narrow(dim, -1, 1))
    return last if keepdim else (last[0].squeeze(dim), last[1].squeeze(dim))


def _median(x: torch.Tensor) -> torch.Tensor:
    return _median_of_axis(x.flatten(), 0)[0]


def _distances(a: torch.Tensor, b: torch.Tensor, p: float, compute_mode: int | None = None) -> torch.Tensor:
    """`torch.cdist` for `a` of (…, P, M) and `b` of (…, R, M): (…, P, R).

    As torch's own: with p = 2 and more than 25 rows |a|² + |b|² - 2ab, which loses half of the digits of small
    distances (mode 0), or always (1), or never (2).
    """
    rows = [size for size in (a.shape[-2], b.shape[-2]) if isinstance(size, int)]
    many = len(rows) < 2 or max(rows) > _SELECTED_BELOW
    if p == 2 and (compute_mode == 1 or (not compute_mode and many)):
        squares = (a * a).sum(-1, keepdim=True) + (b * b).sum(-1).unsqueeze(-2)
        return (squares - 2 * a @ b.transpose(-1, -2)).clamp(min=0).sqrt()
    difference = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 0:
        return (difference != 0).to(a.dtype).sum(-1)
    if p == 1:
        return difference.sum(-1)
    if p == float("inf"):
        return difference.amax(-1)
    return (difference * difference).sum(-1).sqrt() if p == 2 else difference.pow(p).sum(-1).pow(1 / p)


def _assign(
    x: torch.Tensor, indices: Sequence[torch.Tensor | None], values: torch.Tensor, accumulate: bool = False
) -> Any:
    """`x[mask] = values` as a choice between two tensors, where no other index stands beside the mask."""
    position = next((number for number, index in enumerate(indices) if index is not None), 0)
    mask = indices[position]
    alone = mask is not None and mask.dtype == torch.bool and sum(index is not None for index in indices) == 1
    if not alone or accumulate:
        return NotImplemented
    assert mask is not None
    behind = x.ndim - position - mask.ndim
    # One value for each True, in order, is a scatter by positions that only the data tell.
    if values.ndim > behind and not all(size == 1 for size in values.shape[: values.ndim - behind]):
        return NotImplemented
    if values.ndim > behind:
        values = values.reshape(values.shape[values.ndim - behind :])
    if position:  # torch then lays the axes of `values` otherwise than it lays those of `x`
        if values.numel() != 1:
            return NotImplemented
        values = values.reshape(())
    return torch.where(mask.reshape((*mask.shape, *[1] * behind)), values, x)


_MASKED = frozenset({aten.index_put.default, aten.index_put_.default})
_TABLE: dict[Any, Callable[..., Any]] = {
    aten.median.default: _median,
    aten.median.dim: _median_of_axis,
    aten._cdist_forward.default: _distances,
    aten.cdist.default: lambda a, b, p=2.0, compute_mode=None: _distances(a, b, p, compute_mode),
    **dict.fromkeys(_MASKED, _assign),
}
