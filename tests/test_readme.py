"""README's words are commands that run."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_python_example_runs(tmp_path: Path) -> None:
    example = next(block for block in blocks("python") if "trtforge.convert" in block)
    done = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("built", "validated")
    assert (tmp_path / "artifacts/small/report.html").is_file()


def test_plan_in_readme_is_a_plan() -> None:
    from trtforge.runtime.precision import PrecisionPlan

    plan = PrecisionPlan.from_yaml(next(block for block in blocks("yaml") if block.startswith("default:")))
    assert (plan.default, len(plan.rules)) == ("fp16", 2)


def test_file_in_readme_is_one(tmp_path: Path) -> None:
    from trtforge.converter.config import read_config

    path = tmp_path / "readme.yaml"
    path.write_text(next(block for block in blocks("yaml") if block.startswith("version:")))
    (config,) = read_config(path)
    assert (config.name, config.plan.default) == ("resnet18", "fp16")


@pytest.mark.slow
def test_shell_commands_run(tmp_path: Path) -> None:
    lines = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("trtforge ")]
    assert len(lines) >= 4
    subprocess.run([sys.executable, ROOT / "examples/digits/train.py"], check=True)
    for line in lines:
        words = shlex.split(
            line.replace("artifacts", str(tmp_path)).replace("ranges.json", str(tmp_path / "ranges.json")),
            comments=True,
        )
        done = subprocess.run([sys.executable, "-m", *words], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{line}\n{done.stderr}"


@pytest.mark.slow
def test_demo_runs() -> None:
    demo = [sys.executable, ROOT / "examples/digits/demo.py"]
    done = subprocess.run(demo, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("99.78%") == 4, done.stdout  # PyTorch, fp32, fp16, bf16


def test_files_named_in_readme_exist() -> None:
    links = re.findall(r"\]\(([\w/.]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
