"""Every notebook of the pages runs from top to bottom, and is kept with its outputs."""

import itertools
import os

import nbclient
import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from snippets import ROOT


NOTEBOOKS = sorted((ROOT / "docs").glob("*.ipynb"))
KERNEL = "python3"


def _read(path):
    return nbformat.read(path, as_version=4)


def _code(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if cell.source.strip()]


def _execute(notebook, folder):
    # The kernel runs somewhere else, and with the figures that a reader has.
    env = {name: text for name, text in os.environ.items() if name != "MPLBACKEND"}
    paths = [str(ROOT), *filter(None, [env.get("PYTHONPATH")])]
    env["PYTHONPATH"] = os.pathsep.join(paths)
    resources = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name=KERNEL, resources=resources
    )
    client.execute(env=env)


def _errors(notebook):
    """What went wrong, or was written to the error stream."""
    return [
        output.get("text") or output.get("evalue")
        for cell in _code(notebook)
        for output in cell.outputs
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def _kinds(cell):
    """Of its outputs; what is printed may come in several parts."""
    kinds = [output.output_type for output in cell.outputs]
    return [kind for kind, _ in itertools.groupby(kinds)]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_kept(path):
    notebook = _read(path)
    cells = _code(notebook)
    counts = [cell.execution_count for cell in cells]
    assert counts == list(range(1, len(cells) + 1)), "not run once, in order"
    assert any(cell.outputs for cell in cells)
    assert not _errors(notebook)
    assert notebook.metadata.kernelspec.name == KERNEL


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    kept, again = _read(path), _read(path)
    _execute(again, tmp_path)
    assert not _errors(again)
    for old, new in zip(_code(kept), _code(again), strict=True):
        assert _kinds(new) == _kinds(old), old.source


@pytest.mark.slow
def test_a_cell_that_fails_is_found(tmp_path):
    cells = [nbformat.v4.new_code_cell(text) for text in ("x = 1", "assert x == 2")]
    notebook = nbformat.v4.new_notebook(cells=cells)
    with pytest.raises(CellExecutionError, match="AssertionError"):
        _execute(notebook, tmp_path)
