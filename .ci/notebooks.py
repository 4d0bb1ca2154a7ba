"""Executes the notebooks in place, with the reader's sizes, and leaves nothing of this machine in them.

    python .ci/notebooks.py [--check] [NAMES]

NAMES are those of files in notebooks/, without the folder, as `quickstart` (default: all). `--check` executes
nothing; it says what is wrong with the committed files and fails if anything is.

A notebook runs in an empty folder, in this Python, without a network.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import nbformat
from jupyter_client import AsyncKernelManager
from jupyter_client.kernelspec import KernelSpec
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parents[1] / "notebooks"
PROFILE = "SPARSEKV_NOTEBOOK_PROFILE"
MOST_LINES = 15  # of a code cell
MOST_PNG_BYTES = 200 * 1024
CELL_SECONDS = 600
_TRANSPORT = "ipc" if os.name == "posix" else "tcp"  # others on the machine could listen to the latter
_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
# Of the machine that ran it: any absolute path into a folder. URLs, ratios and tags have slashes, too, but after
# something else.
_OWN_PATH = re.compile(r"(?<![\w.:/<])/[\w.-]+/|(?<!\w)[A-Z]:\\\\")


class _ThisPython(AsyncKernelManager):
    """Starts the kernel with the Python that runs this, whatever kernels are installed."""

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
        return KernelSpec(argv=command, display_name="Python 3", language="python")


def execute(notebook: NotebookNode, profile: str = "full", folder: Path | None = None) -> NotebookNode:
    """Runs all cells of the notebook, which is changed, in `folder` (default: a temporary one).

    Args:
        profile: `full`, the reader's sizes, or `ci`, the small ones (`sparsekv.evaluation.notebook.profile`).

    Raises:
        nbclient.exceptions.CellExecutionError: a cell failed; its traceback is in the message.
        nbclient.exceptions.CellTimeoutError: a cell took longer than `CELL_SECONDS`.
    """
    with tempfile.TemporaryDirectory() as spare:
        where = folder or Path(spare, "run")
        where.mkdir(exist_ok=True)
        kernel = _ThisPython(transport=_TRANSPORT, connection_file=str(Path(spare, "kernel.json")))
        client = NotebookClient(
            notebook,
            km=kernel,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": str(where)}},
            record_timing=False,
            store_widget_state=False,
        )
        client.execute(env=_environment(profile, Path(spare)), cleanup_kc=True)
    return notebook


def _environment(profile: str, spare: Path) -> dict[str, str]:
    """Nothing is fetched, drawn to a screen, or left in the home."""
    ours = {name: str(spare / name.lower()) for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")}
    ours |= {PROFILE: profile, "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    ours |= {
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore:IProgress not found,ignore:TensorFloat32 tensor cores",
    }
    return {**os.environ, **ours}


def normalised(notebook: NotebookNode) -> NotebookNode:
    """The same notebook as everyone gets it: cells numbered, plain metadata, output in whole pieces."""
    cells = []
    for number, cell in enumerate(notebook.cells):
        plain = {"id": f"cell-{number:02}", "cell_type": cell.cell_type, "metadata": {}, "source": cell.source}
        if cell.cell_type == "code":
            plain |= {"execution_count": cell.execution_count, "outputs": _joined(cell.outputs)}
        cells.append(plain)
    return nbformat.from_dict({"cells": cells, "metadata": _METADATA, "nbformat": 4, "nbformat_minor": 5})


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """What was printed in one go, however many messages it came in; no metadata of outputs."""
    found: list[Any] = []
    for output in outputs:
        if found and output.output_type == "stream" and found[-1].get("name") == output.name:
            found[-1].text += output.text
            continue
        found.append(nbformat.from_dict({**output, **({"metadata": {}} if "metadata" in output else {})}))
    return found


def complaints(notebook: NotebookNode) -> list[str]:
    """What is wrong with the cells of a notebook, and with what they show."""
    return [
        f"code cell {number} ({next(iter(cell.source.splitlines()), '')[:60]}) {text}"
        for number, cell in enumerate(_code_cells(notebook), 1)
        for text in (*_of_source(cell), *_of_outputs(cell))
    ]


def _code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _of_source(cell: NotebookNode) -> Iterator[str]:
    lines = sum(bool(line.strip()) for line in cell.source.splitlines())
    if lines > MOST_LINES:
        yield f"has {lines} lines, more than {MOST_LINES}: what several notebooks need belongs into evaluation/"
    if _OWN_PATH.search(cell.source):
        yield "names a path of one machine"


def _of_outputs(cell: NotebookNode) -> Iterator[str]:
    for output in cell.outputs:
        if output.output_type == "error":
            yield f"failed: {output.ename}: {output.evalue}\n" + "\n".join(output.traceback)
        if output.get("name") == "stderr":
            yield f"wrote to stderr: {output.text}"
        data = output.get("data", {})
        texts = [output.get("text", ""), *(text for kind, text in data.items() if kind != "image/png")]
        if found := _OWN_PATH.search("\n".join(map(str, texts))):
            yield f"shows a path of the machine that ran it: {found.group()}"
        if len(data.get("image/png", "")) * 3 // 4 > MOST_PNG_BYTES:
            yield f"shows a picture of more than {MOST_PNG_BYTES // 1024} KiB"


def check(path: Path) -> list[str]:
    """What is wrong with a committed notebook, executing nothing."""
    notebook = nbformat.read(path, as_version=4)
    found, code = complaints(notebook), _code_cells(notebook)
    if [cell.execution_count for cell in code] != list(range(1, len(code) + 1)) or not any(x.outputs for x in code):
        found.append("was not executed from its first cell to its last: run this program")
    if nbformat.writes(normalised(notebook)) != nbformat.writes(notebook):
        found.append("is not as this program leaves it: run it, without --check")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAMES")
    parser.add_argument("--check", action="store_true", help="execute nothing, say what is wrong")
    args = parser.parse_args(arguments)
    paths = [FOLDER / f"{name.removesuffix('.ipynb')}.ipynb" for name in args.names] or sorted(FOLDER.glob("*.ipynb"))
    wrong = []
    for path in paths:
        if not args.check:
            start = time.monotonic()
            nbformat.write(normalised(execute(nbformat.read(path, as_version=4))), path)
            print(f"{path.name}: executed in {time.monotonic() - start:.0f} s")
        wrong += [f"{path.name}: {text}" for text in check(path)]
    print("\n".join(wrong) or f"{len(paths)} notebooks: nothing to complain about")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
