"""Latency and throughput of an artifact's engine over batch sizes and shapes, and of its peers in the same run."""

from __future__ import annotations

import datetime as dt
import functools
import math
import platform
import resource
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from trtforge.converter.artifact import Artifact
from trtforge.converter.bench_cases import Case
from trtforge.runtime.batch_tuning import Tuned, tune_batch
from trtforge.runtime.errors import ConfigError, TrtForgeError
from trtforge.runtime.inputs import make_inputs
from trtforge.runtime.timing import DEFAULT_EFFORT, Call, Effort, Gpu, Timing, time_sides

if TYPE_CHECKING:
    import torch

    from trtforge.runtime.engine import Engine
    from trtforge.runtime.peers import Side

__all__ = ["ENGINE", "BenchResult", "Row", "bench_sides", "engine_sides", "environment_facts", "tune"]

ENGINE = "engine"
"""The plain call, as `engine(x)`: what everything else is compared with."""


@dataclass(frozen=True, slots=True)
class Row:
    """One side in one case.

    Attributes:
        case: The case's label.
        batch: Items in one call.
        side: What ran.
        timing: Its figures.
        cosine: Between its outputs and the engine's, so that all sides are seen to compute the same; None where they
            have no floats, or cannot be read.
        prepare_s: Seconds until its first result in this case: compilation, capture.
        gpu_bytes: Memory of the GPU that this took; its weights too, the first time.
    """

    case: str
    batch: int
    side: str
    timing: Timing
    cosine: float | None
    prepare_s: float
    gpu_bytes: int

    @property
    def items_per_second(self) -> float:
        """Throughput, of calls that are queued."""
        return 1000.0 * self.batch / self.timing.queued_ms

    def to_json(self) -> dict[str, Any]:
        """As `bench --json` holds it."""
        return {
            "case": self.case,
            "batch": self.batch,
            "side": self.side,
            **self.timing.to_json(),
            "items_per_second": self.items_per_second,
            "cosine": self.cosine,
            "prepare_s": self.prepare_s,
            "gpu_bytes": self.gpu_bytes,
        }


@dataclass(slots=True)
class BenchResult:
    """Everything that one run measured.

    Attributes:
        name: The artifact's.
        facts: Device, versions, precision, when.
        rows: In the order in which they were measured.
        absent: Sides that did not run, and why; a side that failed in one case alone is named with the case.
        tuned: What the search for a batch size found, where there was one.
        host_bytes: The most memory that this process held.
    """

    name: str
    facts: Mapping[str, Any]
    rows: list[Row] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    tuned: Tuned | None = None
    host_bytes: int = 0

    def to_json(self) -> dict[str, Any]:
        """As `bench --json` prints it, and as the report keeps it."""
        data = {
            "name": self.name,
            **self.facts,
            "rows": [row.to_json() for row in self.rows],
            "absent": dict(self.absent),
            "host_bytes": self.host_bytes,
        }
        if self.tuned is not None:
            data["tuned"] = {
                "limit_ms": self.tuned.limit_ms,
                "batch": self.tuned.batch,
                "tried": [{"batch": batch, **timing.to_json()} for batch, timing in self.tuned.tried.items()],
            }
        return data


def engine_sides(graphs: Engine, plain: Engine) -> list[Side]:
    """The engine's own ways of being called: plain, bound to buffers, and without CUDA graphs.

    Args:
        graphs: Loaded as usual.
        plain: The same engine, loaded with `graphs=0`.
    """
    from trtforge.runtime.peers import Side

    def call(engine: Engine) -> Any:
        return lambda inputs: functools.partial(engine, *_ordered(engine, inputs))

    return [
        Side(ENGINE, call(graphs)),
        Side("engine, bound", lambda inputs: graphs.bind(*(x.clone() for x in _ordered(graphs, inputs)))),
        Side("engine, no graph", call(plain)),
    ]


def bench_sides(
    artifact: Artifact,
    cases: Sequence[Case],
    sides: Iterable[Side],
    gpu: Gpu,
    device: torch.device,
    result: BenchResult,
    *,
    effort: Effort = DEFAULT_EFFORT,
) -> None:
    """Measures every side in every case, and adds to `result` as it goes.

    Args:
        artifact: Its inputs are what is generated.
        cases: Sizes.
        sides: The engine's plain call first.
        gpu: What times.
        device: Where inputs go.
        result: Receives rows, and the reasons of sides that did not run.
        effort: How long each is timed.
    """
    sides = list(sides)
    for case in cases:
        inputs = device_inputs(artifact, case.sizes, device)
        opened: dict[str, Call] = {}
        seen: dict[str, tuple[float | None, float, int]] = {}
        expected: list[torch.Tensor] = []
        for side in sides:
            if side.name in result.absent:
                continue
            before, started = gpu.used_bytes(), time.perf_counter()
            try:
                call = side.open(inputs)
                outputs = _read(call())
                seconds = time.perf_counter() - started
                _settle(call)
            except TrtForgeError as error:
                if side.name == ENGINE:
                    raise
                result.absent[side.name] = error.what + (f" ({error.fix})" if error.fix else "")
                continue
            except Exception as error:  # noqa: BLE001  # a peer's failure is a line of the result, not its end
                where = side.name if len(cases) == 1 else f"{side.name}, {case.label}"
                result.absent[where] = f"{type(error).__name__}: {_first_line(error)}"
                continue
            expected = expected or outputs
            opened[side.name] = call
            seen[side.name] = (_cosine(outputs, expected), seconds, max(0, gpu.used_bytes() - before))
        for name, timing in time_sides(opened, gpu, effort).items():
            cosine, seconds, size = seen[name]
            result.rows.append(Row(case.label, case.batch, name, timing, cosine, seconds, size))
    result.host_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def tune(
    artifact: Artifact,
    engine: Engine,
    dim: str,
    sizes: Mapping[str, int],
    limit_ms: float,
    gpu: Gpu,
    device: torch.device,
    *,
    effort: Effort = DEFAULT_EFFORT,
) -> Tuned:
    """The batch size whose p99 latency keeps within a limit and which serves the most.

    Args:
        artifact: Its profiles say which sizes the engine takes.
        engine: Loaded.
        dim: The batch's dimension.
        sizes: Of all other dimensions.
        limit_ms: Milliseconds.
        gpu: What times.
        device: Where inputs go.
        effort: How long each size is timed.

    Raises:
        ConfigError: the limit is not positive.
    """
    if not limit_ms > 0 or not math.isfinite(limit_ms):
        raise ConfigError(f"a latency limit of {limit_ms} ms", fix="give milliseconds above 0")
    others = [
        p[dim] for p in artifact.profiles if all(p[n].min <= size <= p[n].max for n, size in sizes.items() if n != dim)
    ]
    if not others:
        raise ConfigError(
            f"no profile holds {dict(sizes)}", fix=f"give sizes of a profile: trtforge inspect {artifact.path}"
        )

    def measure(batch: int) -> Timing:
        inputs = device_inputs(artifact, {**sizes, dim: batch}, device)
        call = functools.partial(engine, *_ordered(engine, inputs))
        _settle(call)
        return time_sides({ENGINE: call}, gpu, effort)[ENGINE]

    return tune_batch(measure, min(o.min for o in others), max(o.max for o in others), limit_ms)


def device_inputs(artifact: Artifact, sizes: Mapping[str, int], device: torch.device) -> dict[str, torch.Tensor]:
    """Seeded inputs by name, in the engine's order."""
    from trtforge.runtime.torch_runner import to_torch

    return {name: to_torch(array).to(device) for name, array in make_inputs(artifact.inputs, sizes, 0).items()}


def environment_facts(artifact: Artifact, device_name: str) -> dict[str, Any]:
    """What a figure means nothing without."""
    import torch

    engine = artifact.facts["engine"]
    return {
        "precision": artifact.facts["precision"],
        "device": device_name,
        "versions": {
            "python": platform.python_version(),
            "torch": str(torch.__version__),
            engine["backend"]: engine["version"],
        },
        "date": dt.datetime.now(dt.timezone.utc).isoformat(timespec="seconds"),
    }


def _ordered(engine: Engine, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    return [inputs[spec.name] for spec in engine.inputs]


def _settle(call: Call) -> None:
    # An engine captures its graph at the second call with a shape; torch.compile records its own at the second.
    for _ in range(3):
        call()


def _read(result: Any) -> list[torch.Tensor]:
    from trtforge.runtime.peers import as_tensors

    try:
        return [x.detach().double().cpu() for x in as_tensors(result) if x.is_floating_point()]
    except TypeError:
        return []


def _cosine(outputs: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float | None:
    import torch

    if not outputs or [x.shape for x in outputs] != [x.shape for x in expected]:
        return None
    a, b = (torch.cat([x.flatten() for x in side]) for side in (outputs, expected))
    return float(torch.nn.functional.cosine_similarity(a, b, dim=0))


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else ""
