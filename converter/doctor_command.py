"""What `trtforge doctor` prints: tables on a terminal, plain lines elsewhere, one JSON object with `--json`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from trtforge.converter.doctor import Diagnosis, diagnose
from trtforge.converter.terminal import print_json, print_table, print_text

__all__ = ["doctor"]

_TITLES = {
    "needs_gpu_to_build": "build without a GPU",
    "bf16": "bfloat16",
    "int8_matmul": "INT8 MatMul",
    "int8_conv": "INT8 Conv",
    "fp8": "FP8",
    "half_quantized_products": "quantized products in float16",
    "plugins": "plugins",
    "timing_cache": "timing cache",
    "version_compatible": "engines for later releases",
    "hardware_compatibility": "engines for a family of GPUs",
    "weight_streaming": "weight streaming",
    "refit": "refit",
}

Rows = list[list[str]]


def doctor(*, as_json: bool) -> int:
    """Prints the diagnosis; the exit code is 0 where all that is needed works, else of the first problem."""
    found = diagnose()
    if as_json:
        print_json(found.to_json())
        return found.exit_code
    for title, columns, rows in _tables(found):
        if sys.stdout.isatty():
            print_table(title, columns, rows)
        else:
            print_text("\n".join([f"{title}:", *("  " + "  ".join(cell for cell in row if cell) for row in rows)]))
    for problem in found.problems:
        print_text(f"problem: {problem.what}\n  fix: {problem.fix}")
    if not found.problems:
        print_text("all that is needed works")
    return found.exit_code


def _tables(found: Diagnosis) -> Iterator[tuple[str, tuple[str, ...], Rows]]:
    facts = found.inventory
    yield "machine", ("what", "is"), _machine(facts)
    packages = [[name, *_package(package)] for name, package in facts["packages"].items()]
    yield "libraries", ("module", "version", "where", "notes"), packages
    flavours = []
    for name, flavour in facts["tensorrt"].items():
        flavours.append([name, flavour.get("version", "-"), flavour.get("module", ""), flavour.get("error", "")])
        flavours += [["", "", library, ""] for library in flavour.get("libraries", ())]
    yield "TensorRT", ("flavour", "version", "where", "notes"), flavours
    if found.backend is not None:
        yield f"`backend: auto` is {found.backend}", ("can", ""), _capabilities(found)
    yield "trial: a small network through the whole chain", ("what", "is"), _trial(found.trial)


def _machine(facts: dict[str, Any]) -> Rows:
    python, free = facts["python"], facts["temporary"]
    rows = [
        ["trtforge", f"{facts['trtforge']['version']} in {facts['trtforge']['path']}"],
        ["Python", f"{python['version']}, {python['executable']}"],
        ["platform", python["platform"]],
        ["NVIDIA driver", facts["driver"] or "-"],
    ]
    for gpu in facts["gpus"]:
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        text = f"{gpu['name']}, compute capability {gpu['compute_capability']}, {gpu['sm_count']} SMs, {memory}"
        rows.append(["GPU", f"{text}, driver for CUDA {gpu['cuda_version']}"])
    if not facts["gpus"]:
        rows.append(["GPU", f"none: {facts['why_no_gpu']}; engines are built and not run"])
    rows += [["cache", f"{c['path']}: {c['files']} files, {c['bytes'] / 1e6:.1f} MB"] for c in facts["caches"]]
    rows.append(["temporary files", f"{free['path']}: {free['free_bytes'] / 1e9:.1f} GB free"])
    rows.append(["C compiler", f"{facts['c_compiler'] or 'none'} (used at installation, for faster calibration)"])
    rows.append(
        ["CUDA toolkit", f"{facts['cuda_home'] or 'no CUDA_HOME'} (not needed: the wheels bring the libraries)"]
    )
    return rows


def _package(package: dict[str, Any]) -> list[str]:
    if not package["installed"]:
        return ["-", "", "not installed"]
    notes = package.get("error", "")
    if "providers" in package:
        notes = ", ".join(package["providers"])
    elif "sees_gpu" in package:
        notes = f"built for CUDA {package['cuda']}" if package["cuda"] else "built for the CPU"
        notes += ", sees the GPU" if package["sees_gpu"] else ", sees no GPU"
    return [package["version"] or "?", package["path"], notes]


def _capabilities(found: Diagnosis) -> Rows:
    assert found.backend is not None
    capabilities = found.backend.capabilities
    rows = []
    for name, title in _TITLES.items():
        can = bool(getattr(capabilities, name)) is not (name == "needs_gpu_to_build")
        rows.append([title, "yes" if can else "no"])
    rows.append(["targets ahead of time", ", ".join(capabilities.targets) or "the GPU of this machine alone"])
    refused = ", ".join(sorted(capabilities.refused_devices))
    rows.append(
        ["runs on", f"compute capability {capabilities.min_device} on" + (f", not {refused}" if refused else "")]
    )
    rows.append(["highest opset", str(capabilities.max_opset)])
    rows.append(["operators that fail to build", ", ".join(sorted(capabilities.doomed_operators)) or "none known"])
    rows.append(["operators that are rewritten", ", ".join(sorted(capabilities.rewritten_operators))])
    return rows


def _trial(trial: dict[str, Any]) -> Rows:
    rows = [["status", trial["status"]]]
    if "why" in trial:
        rows.append(["why", trial["why"]])
    if "error" in trial:
        rows.append(["error", str(trial["error"]["message"])])
    if measured := trial.get("measured"):
        sqnr = measured.get("sqnr_db")
        text = f"{sqnr:.1f} dB" if isinstance(sqnr, int | float) else str(sqnr)
        rows.append(["against PyTorch", f"{measured.get('runner')}, SQNR {text}"])
    if trial.get("seconds"):
        rows.append(["seconds", f"{sum(trial['seconds'].values()):.1f}"])
    return rows
