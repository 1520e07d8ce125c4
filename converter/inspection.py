"""What an artifact or an ONNX file holds, as data: `trtforge inspect`."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from trtforge.converter.artifact import PLAN, REFERENCE, Artifact
from trtforge.converter.manifest import read_manifest
from trtforge.runtime.errors import ConfigError, TrtForgeError
from trtforge.runtime.precision import PrecisionPlan

__all__ = ["describe_path"]


def describe_path(path: Path) -> dict[str, Any]:
    """Facts of an artifact (any status) or an ONNX file; modules and operators with the precision that each runs in.

    Raises:
        ArtifactError: a folder that is no artifact, or an altered one.
        ConfigError: no such file, or not ONNX.
    """
    if path.is_dir():
        artifact = Artifact(path, read_manifest(path))
        facts = {key: value for key, value in artifact.facts.items() if key != "schema"}
        if (path / REFERENCE).exists():
            facts["nodes"] = _modules(path / REFERENCE, artifact.plan if (path / PLAN).exists() else PrecisionPlan())
        return facts
    if not path.is_file():
        raise ConfigError(f"there is no file or folder {path}")
    return _describe_onnx(path)


def _describe_onnx(path: Path) -> dict[str, Any]:
    from trtforge.runtime.graph import describe_model, load_graph

    try:
        model = describe_model(load_graph(path), path)
    except TrtForgeError:
        raise
    except Exception as error:  # protobuf and onnx-ir raise a dozen kinds for a file that is not ONNX
        raise ConfigError(f"{path} is not an ONNX file: {error}") from error
    return {
        "name": path.name,
        "graph": model.hash,
        "opset": model.opset,
        "inputs": [spec.to_json() for spec in model.inputs],
        "outputs": [spec.to_json() for spec in model.outputs],
        "nodes": _modules(path, None),
    }


def _modules(path: Path, plan: PrecisionPlan | None) -> list[dict[str, Any]]:
    from trtforge.runtime.graph import load_graph, node_refs

    refs = node_refs(load_graph(path))
    assigned = plan.resolve(refs) if plan else {}
    rows = Counter(
        (ref.module, ref.op, assigned[ref.id].precision, assigned[ref.id].reason)
        if plan
        else (ref.module, ref.op, "", "")
        for ref in refs
    )
    return [
        {"module": module, "op": op, "count": count, "precision": precision, "reason": reason}
        for (module, op, precision, reason), count in rows.items()
    ]
