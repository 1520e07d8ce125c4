"""Caches of transformers models as what they hold: tensors of keys and values, layer by layer.

`past_key_values` (`cache` in later releases) can then be an input and an output of an engine, its tensors named
`past_key_values.key_cache.0`, and so on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.utils import _pytree

__all__ = ["make_cache", "register_cache"]

_MODULE = "transformers.cache_utils"


def register_cache(kind: type) -> bool:
    """Makes torch see the tensors in transformers' `DynamicCache` and `EncoderDecoderCache`; whether `kind` is one.

    The registration is transformers' own where it has one, and holds for the process, as it does for its exporters.
    """
    if kind.__module__ != _MODULE or kind.__name__ not in ("DynamicCache", "EncoderDecoderCache"):
        return False
    try:
        from transformers.integrations.executorch import register_dynamic_cache_export_support
    except ImportError:  # before 4.53
        return False
    register_dynamic_cache_export_support()  # type: ignore[no-untyped-call]
    if kind.__name__ == "EncoderDecoderCache" and kind not in _pytree.SUPPORTED_NODES:
        _pytree.register_pytree_node(
            kind,
            lambda cache: (_halves(cache), None),
            lambda halves, _: kind(*halves),
            serialized_type_name=f"{_MODULE}.{kind.__name__}",
            flatten_with_keys_fn=lambda cache: (
                [(_pytree.MappingKey(name), half) for name, half in zip(_HALVES, _halves(cache), strict=True)],
                None,
            ),
        )
    return kind in _pytree.SUPPORTED_NODES


def make_cache(tree: Mapping[str, Any]) -> Any:
    """The cache that an argument of these tensors by name stands for; `tree` itself where it is none.

    Args:
        tree: `{"key_cache": tensors, "value_cache": tensors}`, one each a layer, or two such maps by `_HALVES`.
    """
    if set(tree) == set(_HALVES):
        from transformers import EncoderDecoderCache

        return EncoderDecoderCache(*(make_cache(tree[name]) for name in _HALVES))
    if set(tree) != {"key_cache", "value_cache"}:
        return tree
    from transformers import DynamicCache

    return DynamicCache(list(zip(tree["key_cache"], tree["value_cache"], strict=True)))


_HALVES = ("self_attention_cache", "cross_attention_cache")


def _halves(cache: Any) -> list[Any]:
    return [getattr(cache, name) for name in _HALVES]
