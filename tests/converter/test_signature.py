from __future__ import annotations

import dataclasses
from collections import OrderedDict, UserDict
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree

from trtforge.converter.signature import ExampleInputs, bind_call, name_outputs, tensor_leaves
from trtforge.runtime.errors import ConfigError, ExportError
from trtforge.runtime.specs import InputSpec


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclasses.dataclass(frozen=True)
class Frozen:
    a: Any
    b: Any = None


class Box:
    def __init__(self, content: Any) -> None:
        self.content = content


_pytree.register_pytree_node(Box, lambda box: ([box.content], None), lambda children, _: Box(*children))

leaves = st.one_of(
    st.builds(lambda n: torch.full((1,), float(n)), st.integers(0, 99)),
    st.sampled_from([None, 3, 1.5, "text", True, torch.float16]),
)
keys = st.sampled_from(["a", "b", "c"])
trees = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.lists(children, max_size=3),
        st.lists(children, max_size=3).map(tuple),
        st.dictionaries(keys, children, max_size=3),
        st.dictionaries(keys, children, max_size=3).map(OrderedDict),
        st.dictionaries(keys, children, max_size=3).map(UserDict),
        st.builds(Pair, children, children),
        st.builds(Frozen, children, children),
        st.builds(Box, children),
    ),
    max_leaves=8,
)


def shape_of(value: Any) -> Any:
    """The structure with tensors as their numbers, comparable."""
    if isinstance(value, torch.Tensor):
        return ("tensor", float(value))
    if isinstance(value, Frozen):
        return ("frozen", shape_of(value.a), shape_of(value.b))
    if isinstance(value, Box):
        return ("box", shape_of(value.content))
    if isinstance(value, (dict, UserDict)):
        return (type(value), [(key, shape_of(child)) for key, child in value.items()])
    if isinstance(value, (tuple, list)):
        return (type(value), [shape_of(child) for child in value])
    return value


@given(trees)
def test_binding_the_same_tensors_gives_the_same_call(tree: Any) -> None:
    call = ExampleInputs((tree,), {"more": tree}, ())
    args, kwargs = call.bind(call.tensors)
    assert shape_of(args[0]) == shape_of(tree)
    assert shape_of(kwargs["more"]) == shape_of(tree)


@given(trees)
def test_other_tensors_arrive_where_their_paths_say(tree: Any) -> None:
    call = ExampleInputs((tree,), {}, ())
    others = [torch.full((1,), 100.0 + number) for number in range(len(call.tensors))]
    (bound,), _ = call.bind(others)
    assert [path for path, _ in tensor_leaves(bound)] == [path for path, _ in tensor_leaves(tree)]
    assert [float(tensor) for _, tensor in tensor_leaves(bound)] == [100.0 + n for n in range(len(others))]
    assert all(float(tensor) < 100 for tensor in call.tensors)


def test_names_follow_the_parameters_in_the_order_of_binding() -> None:
    class Net(nn.Module):
        def forward(self, x: Any, *rest: Any, scale: Any = None, **named: Any) -> None: ...

    t = torch.ones(1)
    assert bind_call(Net(), (t, {"k": t}, (t, t)), {"other": [t], "scale": t}) == [
        "x", "rest.0.k", "rest.1.0", "rest.1.1", "other.0", "scale",
    ]  # fmt: skip
    example = ExampleInputs((t, t), {"other": [t]}, (InputSpec("x", "float32", (1,)),))
    assert len(example.tensors) == 3


@pytest.mark.parametrize(
    ("result", "names"),
    [
        (torch.ones(1), ["output"]),
        ((torch.ones(1), None, torch.ones(1)), ["output_0", "output_2"]),
        ([torch.ones(1), {"a": torch.ones(1)}], ["output_0", "output_1.a"]),
        ({"logits": torch.ones(1), "n": 3, "aux": (torch.ones(1),)}, ["logits", "aux.0"]),
        (Pair(torch.ones(1), torch.ones(1)), ["left", "right"]),
        (Frozen(torch.ones(1)), ["a"]),
        (Box(torch.ones(1)), ["output_0"]),
        (None, []),
    ],
)
def test_names_of_outputs(result: Any, names: list[str]) -> None:
    assert [name for name, _ in name_outputs(result)] == names


class DynamicCache:
    pass


def test_what_holds_no_known_tensors() -> None:
    with pytest.raises(ConfigError, match=r"a\.1 is a builtins\.object"):
        list(tensor_leaves({"a": (1, object())}))
    with pytest.raises(ExportError, match="DynamicCache") as caught:
        name_outputs({"past": DynamicCache()})
    assert "use_cache=False" in caught.value.fix
