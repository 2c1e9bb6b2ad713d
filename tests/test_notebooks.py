"""Every notebook runs from top to bottom (cells flagged `slow` or `gpu` left out)."""

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(
    path
    for path in (ROOT / "nbs").rglob("*.ipynb")
    if not any(part.startswith((".", "_")) for part in path.relative_to(ROOT).parts)
)


@pytest.fixture
def as_before(monkeypatch):
    """nbdev's runner replaces the interrupt handler, and cells may change folder, environment and threads."""
    import torch

    handler, folder, environment, threads = (
        signal.getsignal(signal.SIGINT),
        os.getcwd(),
        dict(os.environ),
        torch.get_num_threads(),
    )
    yield
    signal.signal(signal.SIGINT, handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: str(path.relative_to(ROOT / "nbs")))
def test_notebook(notebook, as_before, capfd):
    from nbdev.test import test_nb as run_notebook

    passed, _ = run_notebook(notebook, skip_flags=["slow", "gpu"], profile=False)
    assert passed, f"{notebook.relative_to(ROOT)} failed:\n{capfd.readouterr().err[-6000:]}"


def test_a_failing_notebook_is_noticed(tmp_path, as_before, capfd):
    """The runner above reports by value, not by exception: were that to change, every notebook would pass."""
    import nbformat
    from nbdev.test import test_nb as run_notebook

    cells = [
        nbformat.v4.new_code_cell(source) for source in ("x = 1", "#| slow\nassert False", "assert x == 2")
    ]
    notebook = tmp_path / "failing.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    assert run_notebook(notebook, skip_flags=["slow"], profile=False)[0] is False
    cells.pop()
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    assert run_notebook(notebook, skip_flags=["slow"], profile=False)[0] is True
