"""An input whose values decide shapes, over the fake at the one seam: kept on the host, and planned by."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from fake_session import FakeContext, FakeSession

from trtforge.runtime.engine import Engine
from trtforge.runtime.errors import ConfigError
from trtforge.runtime.specs import TensorSpec

ROWS = TensorSpec("rows", "int64", (1,))


class FirstRowsContext(FakeContext):
    """y is 2 x + 1 of the first `rows` rows of x [8, 4]."""

    def work(self, addresses, shaped):
        (rows,) = shaped[1]
        source, _, target = addresses
        return super().work((source, target), ((rows, 4),))


class FirstRowsSession(FakeSession):
    def __init__(self) -> None:
        super().__init__(profiles=((8, 8, 8), (8, 8, 8)))
        self.inputs = (*self.inputs, ROWS)
        self.host_inputs = frozenset({"rows"})
        for profile, ends in zip(self.profiles, (((1,), (2,), (4,)), ((4,), (8,), (8,))), strict=True):
            profile["rows"] = ends

    def output_shapes(self, shapes):
        return ((shapes[1][0], 4),)

    def open_context(self, profile, on_layer=None):
        self.open += 1
        return FirstRowsContext(self, profile, on_layer)


@pytest.fixture
def session() -> FirstRowsSession:
    return FirstRowsSession()


@pytest.fixture
def engine(session: FirstRowsSession) -> Engine:
    return Engine.over(session, torch.device("cpu"), lambda: 7)


def test_each_set_of_values_has_its_shapes_and_its_graph(engine: Engine, session: FirstRowsSession) -> None:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    for _ in range(4):
        for rows in (2, 3, 8):
            given = torch.tensor([rows])
            assert torch.equal(engine(x, given), 2 * x[:rows] + 1)
            assert engine(x.numpy(), np.array([rows])).shape == (rows, 4)
    assert engine.graphs == 3
    assert session.launches > 0


def test_the_profile_goes_by_the_values(engine: Engine, session: FirstRowsSession) -> None:
    x = torch.zeros(8, 4)
    engine(x, torch.tensor([1]))
    assert session.open == 1
    engine(x, torch.tensor([8]))
    assert session.open == 2  # only the second profile holds it
    with pytest.raises(ConfigError, match=r"no profile of the engine holds x \[8, 4\], rows \[9\]"):
        engine(x, torch.tensor([9]))


def test_it_cannot_be_bound(engine: Engine) -> None:
    with pytest.raises(ConfigError, match="the values of rows decide shapes"):
        engine.bind(torch.zeros(8, 4), torch.tensor([1]))
