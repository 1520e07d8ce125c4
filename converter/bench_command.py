"""What `trtforge bench` measures and prints."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from trtforge.converter.artifact import Artifact, open_artifact
from trtforge.converter.bench import ENGINE, BenchResult, Row, bench_sides, engine_sides, environment_facts, tune
from trtforge.converter.bench_cases import batch_dim, choose_cases
from trtforge.converter.progress import Stages
from trtforge.converter.terminal import ProgressView, print_json, print_table, print_text
from trtforge.runtime.device import DeviceFacts, device_facts, why_no_gpu
from trtforge.runtime.errors import ArtifactError, ConfigError, TrtForgeError
from trtforge.runtime.suggest import nearest
from trtforge.runtime.timing import DEFAULT_EFFORT, Effort, Gpu

if TYPE_CHECKING:
    import torch

    from trtforge.runtime.engine import Engine
    from trtforge.runtime.peers import Side

__all__ = ["PEERS", "Ask", "bench", "measure", "print_result", "run_bench"]

PEERS = ("eager", "compile", "onnxruntime", "polygraphy", "torch-tensorrt")
_MODULES = ("eager", "compile", "torch-tensorrt")
"""Peers that run the PyTorch model itself."""


@dataclass(frozen=True, slots=True)
class Ask:
    """What is to be measured.

    Attributes:
        batches: Batch sizes; empty: what shapes or profiles say.
        shapes: As `bench_cases.choose_cases` takes them.
        peers: Names out of `PEERS`.
        config: The YAML file of the conversion, for the peers that run the model.
        only: The model in it.
        limit_ms: Find the batch size within this p99 latency; None: don't.
        rounds: In which the sides take turns.
        report: Keep the figures in the artifact's report.
    """

    batches: tuple[int, ...] = ()
    shapes: tuple[str, ...] = ()
    peers: tuple[str, ...] = PEERS
    config: Path | None = None
    only: str | None = None
    limit_ms: float | None = None
    rounds: int = DEFAULT_EFFORT.rounds
    report: bool = True


def bench(path: Path, ask: Ask, *, as_json: bool) -> int:
    """Measures an artifact's engine and its peers, prints the figures, and keeps them in its report."""
    with ProgressView() as view:
        view.name = path.name
        result = run_bench(path, ask, Stages(view.show))
    if as_json:
        print_json(result.to_json())
    else:
        print_result(result)
    if ask.report:
        from trtforge.converter.report_files import add_to_report

        add_to_report(path, {"bench": result.to_json()})
    return 0


def run_bench(path: Path, ask: Ask, stages: Stages) -> BenchResult:
    """Measures without printing.

    Raises:
        ConfigError: an unknown peer, sizes that no profile holds, or a batch size where the batch is fixed.
        ArtifactError: there is no GPU, or the artifact's engine cannot be loaded on it.
    """
    for peer in ask.peers:
        if peer not in PEERS:
            raise ConfigError(f"there is no peer {peer!r}", fix=nearest(peer, PEERS))
    artifact = open_artifact(path)
    choose_cases(artifact.inputs, artifact.profiles, ask.batches, ask.shapes)  # before minutes are spent
    if ask.limit_ms is not None and batch_dim(artifact.inputs) is None:
        raise ConfigError(f"the batch of {path} is fixed", fix="convert with a dynamic batch in `dims`")
    found = _need_gpu(path)
    import torch

    from trtforge.runtime.gpu_events import TorchGpu

    with stages.stage("load", "the engine, with CUDA graphs and without"):
        graphs, plain = artifact.load(), artifact.load(graphs=0)
    with graphs, plain:
        return measure(artifact, ask, (graphs, plain), TorchGpu(), torch.device("cuda", 0), found.name, stages)


def measure(
    artifact: Artifact,
    ask: Ask,
    engines: tuple[Engine, Engine],
    gpu: Gpu,
    device: torch.device,
    device_name: str,
    stages: Stages,
) -> BenchResult:
    """Measures loaded engines: one with CUDA graphs, one without.

    Raises:
        TrtForgeError: as `run_bench`.
    """
    from trtforge.runtime.peers import float32_products

    cases = choose_cases(artifact.inputs, artifact.profiles, ask.batches, ask.shapes)
    result = BenchResult(artifact.name, environment_facts(artifact, device_name))
    effort = Effort(rounds=ask.rounds)
    tf32 = artifact.plan.float_default == "tf32"
    with stages.stage("measure", f"{len(cases)} cases"), float32_products(tf32=tf32):
        sides = [*engine_sides(*engines), *_peer_sides(artifact, ask, device, result)]
        bench_sides(artifact, cases, sides, gpu, device, result, effort=effort)
    dim = batch_dim(artifact.inputs)
    if ask.limit_ms is not None and dim is not None:
        with stages.stage("tune", f"batch size within {ask.limit_ms:g} ms"):
            sizes = cases[0].sizes
            result.tuned = tune(artifact, engines[0], dim, sizes, ask.limit_ms, gpu, device, effort=effort)
    return result


def print_result(result: BenchResult) -> None:
    """A table a case, the sides that did not run, and the batch size that was found."""
    versions = ", ".join(f"{name} {version}" for name, version in result.facts["versions"].items())
    title = f"{result.name}, {result.facts['precision']}, on {result.facts['device']}; {versions}"
    columns = ("case", "side", "median ms", "p90", "p99", "items/s", "engine = 1", "cosine", "GPU MiB", "ready in s")
    engine = {row.case: row.timing.queued_ms for row in result.rows if row.side == ENGINE}
    print_table(title, columns, [_row(row, engine[row.case]) for row in result.rows])
    if result.absent:
        print_table("did not run", ("side", "why"), [[name, why] for name, why in result.absent.items()])
    tuned = result.tuned
    if tuned is None:
        return
    rows = [
        [str(batch), f"{t.median_ms:.3f}", f"{t.p99_ms:.3f}", f"{1000 * batch / t.queued_ms:,.0f}"]
        for batch, t in tuned.tried.items()
    ]
    print_table(f"batch sizes; p99 at most {tuned.limit_ms:g} ms", ("batch", "median ms", "p99", "items/s"), rows)
    if tuned.batch is None:
        print_text(f"No batch size keeps p99 within {tuned.limit_ms:g} ms.")
    else:
        print_text(f"Batch size {tuned.batch} serves the most within {tuned.limit_ms:g} ms.")


def _row(row: Row, engine_ms: float) -> list[str]:
    timing = row.timing
    return [
        row.case,
        row.side,
        f"{timing.median_ms:.3f}",
        f"{timing.p90_ms:.3f}",
        f"{timing.p99_ms:.3f}",
        f"{row.items_per_second:,.0f}",
        f"{timing.queued_ms / engine_ms:.2f}",
        "-" if row.cosine is None else f"{row.cosine:.6f}",
        f"{row.gpu_bytes / (1 << 20):,.0f}",
        f"{row.prepare_s:.2f}",
    ]


def _need_gpu(path: Path) -> DeviceFacts:
    found = device_facts()
    if found is None:
        raise ArtifactError(
            f"the engine of {path} runs on a GPU alone, and there is none here",
            why=why_no_gpu(),
            fix="run this on the machine that it shall serve on",
        )
    return found


def _peer_sides(artifact: Artifact, ask: Ask, device: torch.device, result: BenchResult) -> Sequence[Side]:
    from trtforge.converter.bench_source import find_model
    from trtforge.runtime.peers import module_sides, onnxruntime_side, polygraphy_side

    sides: list[Side] = []
    modules = [name for name in _MODULES if name in ask.peers]
    if modules:
        try:
            sides += module_sides(find_model(artifact, ask.config, ask.only), device, modules)
        except TrtForgeError as error:
            if ask.config is not None:
                raise
            result.absent |= dict.fromkeys(modules, error.what + (f" ({error.fix})" if error.fix else ""))
    if "onnxruntime" in ask.peers:
        sides.append(onnxruntime_side(artifact.model))
    if "polygraphy" in ask.peers:
        assert artifact.engine is not None  # it was loaded
        engine = artifact.facts["engine"]
        sides.append(polygraphy_side(artifact.engine, engine["backend"], tf32=engine["tf32"]))
    return sides
