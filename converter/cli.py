"""The command line: results on stdout, logs and progress on stderr, the exit codes of `trtforge.runtime.errors`."""

from __future__ import annotations

import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from trtforge.runtime.watch import Crash

__all__ = ["app", "main", "run"]

app = typer.Typer(
    name="trtforge",
    help="PyTorch models to TensorRT engines, each emitted only with the proof that it equals the model it came from.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich would cost --help a tenth of a second
    context_settings={"help_option_names": ["-h", "--help"]},
)

AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of a table.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder for the artifacts.")]
ArtifactPath = Annotated[Path, typer.Argument(help="An artifact's folder.")]
Plugins = Annotated[
    list[Path] | None, typer.Option("--plugin", help="A plugin library that the engine needs; repeat it for each.")
]


def _version(wanted: bool) -> None:
    if wanted:
        import trtforge

        typer.echo(f"trtforge {trtforge.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None: ...


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A YAML file of models.")],
    only: Annotated[str | None, typer.Option(help="Convert this model of the file alone.")] = None,
    output: Output = Path("artifacts"),
    jobs: Annotated[int, typer.Option(min=1, help="Convert this many models at once, each in its own process.")] = 1,
    force: Annotated[bool, typer.Option("--force", help="Convert unchanged models too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Convert every model of FILE to an artifact in the output folder: export, cast, prove, build, prove, package.

    A model whose artifact is whole is left as it is where its entry, its files, its code and the installed versions are
    unchanged.
    """
    from trtforge.converter import commands

    raise typer.Exit(commands.convert(file, only=only, output=output, jobs=jobs, force=force, as_json=as_json))


@app.command()
def build(
    path: ArtifactPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Publish the new artifact here.")] = None,
    backend: Annotated[
        str | None, typer.Option(help="auto, tensorrt or tensorrt-rtx; else what the artifact was made for.")
    ] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Build an artifact's engine on this machine: of a `portable` one, or for another release or GPU.

    Needs neither torch nor the model's code. With a GPU the engine is proved by running, and the artifact `validated`.
    """
    from trtforge.converter import commands

    raise typer.Exit(commands.build(path, output=output, backend=backend, plugins=plugin or [], as_json=as_json))


@app.command()
def validate(
    path: ArtifactPath,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Publish the promoted artifact here.")] = None,
    plugin: Plugins = None,
    as_json: AsJson = False,
) -> None:
    """Check an artifact's files and prove it again here; with a GPU a `built` artifact becomes `validated`."""
    from trtforge.converter import commands

    raise typer.Exit(commands.validate(path, output=output, plugins=plugin or [], as_json=as_json))


@app.command()
def doctor(as_json: AsJson = False) -> None:
    """Say what is installed and where, convert a small network with it, and say what to install where that fails."""
    from trtforge.converter.doctor_command import doctor as run

    raise typer.Exit(run(as_json=as_json))


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="An artifact's folder or an ONNX file.")], as_json: AsJson = False
) -> None:
    """Show what an artifact or ONNX file holds: inputs, outputs, precisions, modules, versions, errors."""
    from trtforge.converter import commands

    raise typer.Exit(commands.inspect(path, as_json=as_json))


@app.command()
def diff(
    old: Annotated[Path, typer.Argument(help="An artifact's folder.")],
    new: Annotated[Path, typer.Argument(help="The artifact that is compared with it.")],
    as_json: AsJson = False,
) -> None:
    """Compare two artifacts: figures, what changed, and the likely cause; exit code 4 where NEW is worse than OLD."""
    from trtforge.converter.diff import diff as run

    raise typer.Exit(run(old, new, as_json=as_json))


@app.command("export-triton")
def export_triton(
    path: ArtifactPath,
    repository: Annotated[Path, typer.Argument(help="Triton's model repository; made where it is not there.")],
    name: Annotated[str | None, typer.Option(help="The model's name there; else the artifact's.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="The proved ONNX, for Triton's onnxruntime backend.")] = False,
    allow_unvalidated: Annotated[
        bool, typer.Option("--allow-unvalidated", help="Export an engine that has never run, too.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write an artifact into a Triton model repository, as the next version of its model."""
    from trtforge.converter import commands

    raise typer.Exit(
        commands.export_triton(
            path, repository, name=name, onnx=onnx, allow_unvalidated=allow_unvalidated, as_json=as_json
        )
    )


@app.command()
def report(
    path: Annotated[Path, typer.Argument(help="An artifact's folder, NAME.failed, or a folder of them.")],
    as_json: AsJson = False,
) -> None:
    """Draw report.html (and a batch's index.html) again from report.json; print where they are, and the verdict."""
    from trtforge.converter import commands

    raise typer.Exit(commands.report(path, as_json=as_json))


@app.command()
def bisect(
    path: Annotated[Path, typer.Argument(help="An artifact's folder, or NAME.failed.")],
    on: Annotated[str, typer.Option(help="What runs the candidate: auto, onnxruntime or engine.")] = "auto",
    plan: Annotated[Path | None, typer.Option(help="Write the plan with the exceptions here.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find the layer where it first goes wrong, its Python line, and the exception to the plan that mends it."""
    from trtforge.converter import commands

    raise typer.Exit(commands.bisect(path, on=on, plan=plan, as_json=as_json))


@app.command()
def audit(
    path: ArtifactPath,
    faults: Annotated[int, typer.Option(min=1, help="Faults that exceed the budget on the held-out set.")] = 300,
    rewrites: Annotated[int, typer.Option(min=0, help="Harmless rewrites.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="Decides every fault, rewrite and held-out input.")] = 0,
    loader: Annotated[str | None, typer.Option(help="package.module:function: more held-out batches.")] = None,
    kwargs: Annotated[str | None, typer.Option(help="Its keyword arguments, as a JSON object.")] = None,
    as_json: AsJson = False,
) -> None:
    """Plant faults and harmless rewrites in an artifact's ONNX, and count what its own proof lets through."""
    from trtforge.converter.audit_command import audit as run

    raise typer.Exit(
        run(path, faults=faults, rewrites=rewrites, seed=seed, loader=loader, kwargs=kwargs, as_json=as_json)
    )


@app.command()
def bench(
    path: ArtifactPath,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="A batch size; give the option once for each.")] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(help="Sizes, as batch=8,seq=128; give the option once for each.")
    ] = None,
    peers: Annotated[
        str, typer.Option(help="Of eager, compile, onnxruntime, polygraphy, torch-tensorrt; with commas. none: nobody.")
    ] = "eager,compile,onnxruntime,polygraphy,torch-tensorrt",
    config: Annotated[Path | None, typer.Option(help="The YAML file, for eager and compile.")] = None,
    only: Annotated[str | None, typer.Option(help="The model in it.")] = None,
    batch_tuning: Annotated[
        float | None, typer.Option(help="Find the batch size with the most throughput within this p99 latency, in ms.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="In which all sides take turns.")] = 7,
    report: Annotated[bool, typer.Option(help="Keep the figures in the artifact's report.")] = True,
    as_json: AsJson = False,
) -> None:
    """Measure an artifact's latency and throughput on this GPU, with what people would use instead in the same run."""
    from trtforge.converter.bench_command import Ask
    from trtforge.converter.bench_command import bench as run

    named = () if peers == "none" else tuple(name.strip() for name in peers.split(","))
    ask = Ask(tuple(batch or ()), tuple(shapes or ()), named, config, only, batch_tuning, rounds, report)
    raise typer.Exit(run(path, ask, as_json=as_json))


@app.command()
def calibrate(
    file: Annotated[Path, typer.Argument(help="A YAML file of models.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of ranges (with --shard: the part).")],
    only: Annotated[str | None, typer.Option(help="Calibrate this model of the file.")] = None,
    shard: Annotated[str | None, typer.Option(help="K/N: run this part of the data alone.")] = None,
    merge: Annotated[list[Path] | None, typer.Option(help="A part; give the option once for each.")] = None,
    import_cache: Annotated[Path | None, typer.Option(help="A TensorRT calibration cache instead of data.")] = None,
    export_cache: Annotated[Path | None, typer.Option(help="Also write a TensorRT calibration cache.")] = None,
    trt_version: Annotated[str, typer.Option(help="The version in the written cache's first line.")] = "100300",
    sensitivity: Annotated[
        int | None, typer.Option(help="Rank layers by measured harm; write a plan with the worst N in float.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="Where that plan goes.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find INT8 or FP8 ranges from data, shards or an old TensorRT cache, and the layers that suffer most."""
    from trtforge.converter import commands

    raise typer.Exit(
        commands.calibrate(
            file,
            only=only,
            output=output,
            shard=shard,
            merge=tuple(merge or ()),
            import_cache=import_cache,
            export_cache=export_cache,
            trt_version=trt_version,
            keep=sensitivity,
            plan_output=plan,
            as_json=as_json,
        )
    )


def run() -> None:
    """The console script: `main` in a process that another one watches."""
    _in_utf8()
    from trtforge.runtime.watch import keep_watch

    keep_watch(_tell_crash)
    main()


def main() -> None:
    """The command line in this process: maps errors to exit codes; a traceback is shown for a bug only."""
    from trtforge.converter.stopping import Stopped, stops_cleanly
    from trtforge.runtime.errors import TrtForgeError

    try:
        with stops_cleanly():
            app()
    except TrtForgeError as error:
        from trtforge.converter.terminal import print_error

        print_error(error)
        sys.exit(error.exit_code)
    except Stopped as stopped:
        typer.echo(f"stopped by {stopped}; what was not finished left nothing", err=True)
        sys.exit(stopped.exit_code)


def _tell_crash(crash: Crash) -> int:
    from trtforge.converter.crash import tell_crash

    return tell_crash(crash)


def _in_utf8() -> None:
    """Starts again in UTF-8 mode under a locale that is not UTF-8: native libraries take paths in UTF-8 alone."""
    if sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may hold bytes that are no text


if __name__ == "__main__":
    run()
