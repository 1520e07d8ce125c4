"""Whether trtforge works on this machine: what is installed, what that can do, and a small conversion to show it."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, dataclass
from typing import Any

from trtforge.converter.inventory import REQUIRED, take_inventory, version_of
from trtforge.runtime.child import child_environment, module_command
from trtforge.runtime.device import device_facts
from trtforge.runtime.errors import ArtifactError, MissingDependencyError
from trtforge.runtime.publish import scratch_folder
from trtforge.runtime.trt.backend import BACKENDS, Backend, capabilities_of, find_backend, pip_line

__all__ = ["Diagnosis", "Problem", "diagnose"]

_TRIAL_SECONDS = 300


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that keeps conversions from working here.

    Attributes:
        what: The fact.
        fix: What to do; a pip line where something is to be installed.
        exit_code: As in `trtforge.runtime.errors`.
    """

    what: str
    fix: str
    exit_code: int


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What `trtforge doctor` found.

    Attributes:
        inventory: As `take_inventory` gives it.
        backend: What `auto` picks; None where no TensorRT works.
        trial: The small conversion: `{"status", "seconds", "measured"}`, or `{"status": "not tried", "why"}`.
        problems: Empty where all that is needed works.
    """

    inventory: dict[str, Any]
    backend: Backend | None
    trial: dict[str, Any]
    problems: tuple[Problem, ...]

    @property
    def exit_code(self) -> int:
        """0; else of the first problem, since what comes after it may be its consequence."""
        return self.problems[0].exit_code if self.problems else 0

    def to_json(self) -> dict[str, Any]:
        """One object, as `trtforge doctor --json` prints it."""
        capabilities = None if self.backend is None else _plain(asdict(self.backend.capabilities))
        return {
            **self.inventory,
            "auto": None
            if self.backend is None
            else {"name": self.backend.name, "version": self.backend.version, "capabilities": capabilities},
            "trial": self.trial,
            "problems": [asdict(problem) for problem in self.problems],
        }


def diagnose() -> Diagnosis:
    """Looks at the machine, and where nothing is missing converts a small network on it in a child process."""
    inventory = take_inventory()
    try:
        backend = find_backend()
    except MissingDependencyError:
        backend = None
    problems = [*_package_problems(inventory), *_backend_problems(inventory, backend)]
    if problems:
        missing = "; ".join(problem.what for problem in problems)
        return Diagnosis(inventory, backend, {"status": "not tried", "why": missing}, tuple(problems))
    trial, problem = _convert_trial()
    problems += [problem] if problem else []
    problems += _device_problems(backend)
    return Diagnosis(inventory, backend, trial, tuple(problems))


def _package_problems(inventory: dict[str, Any]) -> list[Problem]:
    found = []
    for module, (distribution, least) in REQUIRED.items():
        facts, line = inventory["packages"][module], f"pip install '{distribution}>={least}'"
        code = MissingDependencyError.exit_code
        if not facts["installed"]:
            found.append(Problem(f"{module} is not installed", line, code))
        elif "error" in facts:
            fix = line.replace("install", "install --force-reinstall")
            found.append(Problem(f"{module} is installed but does not load: {facts['error']}", fix, code))
        elif facts["version"] and version_of(facts["version"]) < version_of(least):
            fix = line.replace("install", "install --upgrade")
            found.append(
                Problem(f"{module} {facts['version']} is installed; the oldest that works is {least}", fix, code)
            )
    return found


def _backend_problems(inventory: dict[str, Any], backend: Backend | None) -> list[Problem]:
    code = MissingDependencyError.exit_code
    if backend is None:
        flavours = inventory["tensorrt"].values()
        old = [flavour["error"] for flavour in flavours if flavour["installed"]]
        lines = "   or   ".join(pip_line(name) for name in reversed(BACKENDS))
        return [Problem("; ".join(old) or "no TensorRT is installed", lines, code)]
    facts = inventory["tensorrt"][backend.name]
    if "error" in facts:
        fix = pip_line(backend.name).replace("install", "install --force-reinstall")
        return [Problem(facts["error"], fix, code)]
    return []


def _device_problems(backend: Backend | None) -> list[Problem]:
    device = device_facts()
    if backend is None or device is None or backend.capabilities.runs_on(device.compute_capability):
        return []
    what = f"{backend} does not run on this {device.name} (compute capability {device.compute_capability})"
    older = device.compute_capability in backend.capabilities.refused_devices
    if older and capabilities_of(backend.name, "1.6").runs_on(device.compute_capability):
        fix = "pip install 'tensorrt-rtx<1.7'"
    else:
        fix = pip_line("tensorrt") + "   and write `backend: tensorrt`, or use another GPU"
    return [Problem(what, fix, ArtifactError.exit_code)]


def _convert_trial() -> tuple[dict[str, Any], Problem | None]:
    """`trtforge convert` of a file with one model, as a user calls it."""
    from trtforge.converter.artifact import open_artifact

    file = {
        "version": 1,
        "models": {
            "trial": {
                "source": {"factory": "trtforge.converter.trial_network:make_network"},
                "dims": {"batch": [1, 4, 8]},
                "inputs": {"input": {"shape": ["batch", 1, 28, 28]}},
            }
        },
    }
    try:
        with scratch_folder() as folder:
            path = folder / "trial.yaml"
            path.write_text(json.dumps(file), encoding="utf-8")
            done = _run([*module_command("trtforge"), "convert", str(path), "--json", "-o", str(folder / "out")])
            try:
                answer = json.loads(done.stdout)["models"]["trial"]
            except (ValueError, KeyError):  # it died, or is broken beyond answering
                answer = {"status": "failed", "error": {"message": _last_words(done.stderr), "stage": "start"}}
            trial = {key: answer.get(key) for key in ("status", "seconds")}
            if done.returncode == 0:
                facts = open_artifact(folder / "out" / "trial").facts
                return trial | {"measured": facts.get("measured")}, None
    except OSError as error:
        reason = f"the temporary folder cannot be written: {error.strerror or error}"
        return {"status": "not tried", "why": reason}, Problem(
            reason, "free space there, or set TMPDIR to another folder", ArtifactError.exit_code
        )
    wrong = answer["error"]
    trial["error"] = wrong
    code = done.returncode if done.returncode > 0 else MissingDependencyError.exit_code
    what, _, rest = str(wrong["message"]).partition("\n")
    fix = rest.rpartition("fix:")[2].strip() or "see the error above; run `trtforge doctor --json` for all of it"
    return trial, Problem(f"the trial network does not convert [{wrong['stage']}]: {what}", fix, code)


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **child_environment()}
    try:
        return subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_TRIAL_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, -9, "", f"it took longer than {_TRIAL_SECONDS} s")


def _last_words(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines[-8:]) or "it ended without a word"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return sorted(value) if isinstance(value, frozenset) else value
