"""The notebooks: as committed, executed and free of one machine's traces; and anew, with small sizes on a CPU."""

import importlib.util
import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

ROOT = Path(__file__).parents[1]

_spec = importlib.util.spec_from_file_location("notebook_runs", ROOT / ".ci" / "notebooks.py")
notebooks = importlib.util.module_from_spec(_spec)
sys.modules["notebook_runs"] = notebooks
_spec.loader.exec_module(notebooks)

each_notebook = pytest.mark.parametrize(
    "path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda path: path.stem
)

# Run before a notebook's cells: a figure without a title or without labels is refused when it is drawn.
LABELS = """
from matplotlib.backend_bases import FigureCanvasBase

def _checked(self, *args, _draw=FigureCanvasBase.print_figure, **kwargs):
    panels = [axes for axes in self.figure.axes if axes.get_visible()]
    told = {
        "title": self.figure.get_suptitle() or any(axes.get_title() for axes in panels),
        "x label": any(axes.get_xlabel() for axes in panels),
        "y label": any(axes.get_ylabel() for axes in panels),
    }
    if lacking := [name for name, text in told.items() if not text]:
        raise ValueError(f"a figure has no {', no '.join(lacking)}")
    return _draw(self, *args, **kwargs)

FigureCanvasBase.print_figure = _checked
"""


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels run on the CPU, and beside the other tests, with one thread each."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    if "PYTEST_XDIST_WORKER" in os.environ:
        monkeypatch.setenv("OMP_NUM_THREADS", "1")


def executed(notebook: NotebookNode, folder: Path) -> NotebookNode:
    """With the small sizes, and every figure checked."""
    notebook.cells.insert(0, new_code_cell(LABELS))
    notebooks.execute(notebook, "ci", folder)
    del notebook.cells[0]
    return notebook


@each_notebook
def test_committed_executed_and_tidy(path: Path) -> None:
    found = notebooks.check(path)
    assert not found, "\n".join(found)


@pytest.mark.wide
@pytest.mark.timeout(240)
@each_notebook
def test_runs_with_small_sizes(path: Path, tmp_path: Path) -> None:
    notebook = executed(nbformat.read(path, as_version=4), tmp_path)
    found = notebooks.complaints(notebook)
    assert not found, "\n".join(found)


# -- the program itself


def notebook_of(*sources: str) -> NotebookNode:
    return new_notebook(cells=[new_markdown_cell("# Title"), *map(new_code_cell, sources)])


@pytest.mark.wide
def test_runs_this_python_in_an_empty_folder_and_leaves_nothing(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    code = "import os, sys; print(sys.executable, os.listdir(), os.environ['SPARSEKV_NOTEBOOK_PROFILE'], end='')"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(home))
        notebook = notebooks.execute(notebook_of(code))
    assert notebook.cells[1].outputs[0].text == f"{sys.executable} [] full"
    assert list(home.iterdir()) == []


@pytest.mark.wide
@pytest.mark.parametrize(("code", "wrong"), [("plot([1, 2])", "title, no x label"), ("xlabel('x')", "title, no y")])
def test_a_figure_without_labels_is_told(code: str, wrong: str, tmp_path: Path) -> None:
    notebook = executed(notebook_of("%matplotlib inline\nfrom matplotlib.pyplot import *", f"{code};"), tmp_path)
    assert wrong in "\n".join(notebooks.complaints(notebook))


@pytest.mark.wide
def test_a_failing_cell_fails_the_run_with_its_traceback() -> None:
    with pytest.raises(CellExecutionError, match="number = 1 / 0"):
        notebooks.execute(notebook_of("number = 1 / 0"))


@pytest.mark.parametrize(
    ("cell", "wrong"),
    [
        (new_code_cell("x = 1\n" * 16), "has 16 lines"),
        (new_code_cell("\n\n".join(["x = 1"] * 15)), None),
        (new_code_cell("open('/home/me/file')"), "names a path"),
        (new_code_cell("x", outputs=[new_output("stream", name="stderr", text="a warning")]), "stderr: a warning"),
        (new_code_cell("x", outputs=[new_output("stream", text="see /tmp/run/report.html")]), "shows a path"),
        (new_code_cell("x", outputs=[new_output("stream", text="in /some/lib/site-packages/x.py")]), "shows a path"),
        (new_code_cell("x", outputs=[new_output("stream", text="https://host.org/home/page, 1/tmp/2")]), None),
        (new_code_cell("x", outputs=[new_output("error", ename="E", evalue="bad", traceback=["line"])]), "failed: E"),
        (new_code_cell("x", outputs=[new_output("display_data", {"image/png": "A" * 300_000})]), "picture of more"),
    ],
)
def test_complaints(cell: NotebookNode, wrong: str | None) -> None:
    found = notebooks.complaints(new_notebook(cells=[cell]))
    assert [wrong in text for text in found] == [True] * (wrong is not None), found


def test_normalised_has_nothing_of_the_run_but_its_outputs() -> None:
    outputs = [new_output("stream", name="stdout", text=text) for text in ("one ", "two")]
    cell = new_code_cell("print()", outputs=outputs, execution_count=1, metadata={"execution": {"started": "now"}})
    given = new_notebook(cells=[new_markdown_cell("text"), cell])
    given.metadata.language_info = {"name": "python", "version": "3.11.7"}
    once = notebooks.normalised(given)
    assert [cell.id for cell in once.cells] == ["cell-00", "cell-01"]
    assert once.cells[1].metadata == {}
    assert [output.text for output in once.cells[1].outputs] == ["one two"]
    assert "3.11" not in nbformat.writes(once)
    nbformat.validate(once)
    assert nbformat.writes(notebooks.normalised(once)) == nbformat.writes(once)


def test_a_notebook_that_was_not_run_in_order_is_told(tmp_path: Path) -> None:
    notebook = notebook_of("1", "2")
    for cell, count in zip(notebook.cells[1:], (1, 3), strict=True):
        cell |= {"execution_count": count, "outputs": [new_output("stream", text="x")]}
    nbformat.write(notebooks.normalised(notebook), tmp_path / "some.ipynb")
    assert "not executed from its first cell" in "".join(notebooks.check(tmp_path / "some.ipynb"))
