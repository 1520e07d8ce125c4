"""Who calls `convert()`: an unguarded script with a local class, a notebook, a thread. None is imported again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_models import ENVIRONMENT

SCRIPT = """
import pathlib, threading, torch, trtforge

with pathlib.Path("runs").open("a") as runs:
    runs.write("once ")

def main():
    class Local(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(4, 3)
            self.scale = lambda x: x * 2
        def forward(self, x):
            return self.scale(self.linear(x))

    torch.manual_seed(0)
    return trtforge.convert(Local(), torch.randn(2, 4), "out/local", dims={"n": (1, 2, 4)}, inputs={"x": ("n", 4)})

print(main().status)
"""
THREAD = SCRIPT.replace(
    "print(main().status)", "t = threading.Thread(target=lambda: print(main().status))\nt.start()\nt.join()"
)
CELL = f"""
namespace = {{"__name__": "__main__", "__builtins__": __builtins__}}  # as IPython: no __file__, no source on disk
for cell in {SCRIPT.split("def main")[0]!r}, {"def main" + SCRIPT.split("def main")[1]!r}:
    exec(compile(cell, "<ipython-input-1-abcdef>", "exec"), namespace)
"""


def check(folder: Path, command: list[str], text: str | None = None) -> None:
    env = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        command, cwd=folder, input=text, capture_output=True, text=True, check=False, env=env, timeout=200
    )
    assert done.stdout.split() in (["built"], ["validated"]), done.stderr
    assert (folder / "runs").read_text() == "once "
    assert os.listdir(folder / "out") == ["local"]


def test_unguarded_script_with_a_local_class(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    check(tmp_path, [sys.executable, "script.py"])


@pytest.mark.slow
def test_thread(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(THREAD)
    check(tmp_path, [sys.executable, "script.py"])


def test_cells_of_a_notebook(tmp_path: Path) -> None:
    """Code that no file holds, piped into the interpreter and compiled as IPython does."""
    check(tmp_path, [sys.executable, "-"], CELL)


@pytest.mark.slow
def test_a_notebook_in_its_kernel(tmp_path: Path) -> None:
    """A real kernel of Jupyter runs the cells; the file of the second one is nowhere on the disk."""
    import nbformat
    from nbclient import NotebookClient

    head, tail = SCRIPT.split("def main")
    cells = [nbformat.v4.new_code_cell(text) for text in (head, "def main" + tail)]
    client = NotebookClient(
        nbformat.v4.new_notebook(cells=cells), timeout=200, resources={"metadata": {"path": str(tmp_path)}}
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    done = client.execute(env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths})
    (output,) = done.cells[1].outputs
    assert output.text.split() in (["built"], ["validated"])
    assert (tmp_path / "runs").read_text() == "once "
    assert os.listdir(tmp_path / "out") == ["local"]
