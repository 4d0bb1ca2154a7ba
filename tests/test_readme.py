"""The Python blocks of the README and of docs/ run as printed; the README's shell blocks are run by `.ci/readme.py`,
which has the conventions.

The blocks of one `## ` section run in order, in one namespace, as a reader would paste them: in a process of their
own, in an empty directory, without a network. A section whose blocks all come after `<!-- not run: the reason -->` is
skipped with that reason.
"""

import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"

_spec = importlib.util.spec_from_file_location("readme_blocks", ROOT / ".ci" / "readme.py")
readme = importlib.util.module_from_spec(_spec)
sys.modules["readme_blocks"] = readme  # its dataclass looks itself up there
_spec.loader.exec_module(readme)

NOT_RUN = "not run: "


def python_sections() -> list[list]:
    """The Python blocks of README.md and docs/, section by section."""
    pages = [README, *sorted((ROOT / "docs").glob("*.md"))]
    python = [block for page in pages for block in readme.blocks(page.read_text()) if block.language == "python"]
    return [list(group) for _, group in itertools.groupby(python, key=lambda block: block.section)]


@pytest.mark.parametrize("section", python_sections(), ids=lambda section: section[0].section or "top")
def test_python_blocks_run(section: list, tmp_path: Path) -> None:
    runnable = [block for block in section if not block.comment.startswith(NOT_RUN)]
    if not runnable:
        pytest.skip("README: " + "; ".join(block.comment.removeprefix(NOT_RUN) for block in section))
    # Padded with empty lines, so that a traceback gives the line of README.md.
    program = "namespace = {'__name__': '__main__'}\n" + "".join(
        f"exec(compile({chr(10) * (block.line - 1) + block.code!r}, 'README.md', 'exec'), namespace)\n"
        for block in runnable
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_shell_quickstart_is_marked_to_run() -> None:
    marked = [block for block in readme.blocks(README.read_text()) if block.comment == "run"]
    assert any(block.language == "bash" for block in marked)


def test_blocks_are_read_with_their_comment_section_and_line() -> None:
    text = """# Title
<!-- a table -->
<!-- run -->
```bash
make demo
```

## Use
```python
a = 1
```
<!-- not run: needs a GPU -->

```python
b = 2
```
<!-- a remark -->
some text
```python
c = 3
```
"""
    assert [(b.language, b.code, b.line, b.section, b.comment) for b in readme.blocks(text)] == [
        ("bash", "make demo\n", 5, "", "run"),
        ("python", "a = 1\n", 10, "Use", ""),
        ("python", "b = 2\n", 15, "Use", "not run: needs a GPU"),
        ("python", "c = 3\n", 20, "Use", ""),
    ]


def test_a_failing_shell_block_fails_the_run(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("<!-- run -->\n```bash\nfalse\necho unreached\n```\n")
    done = subprocess.run([sys.executable, ROOT / ".ci" / "readme.py", page], capture_output=True, text=True)
    assert done.returncode == 1
    assert "unreached\n--" not in done.stdout
    assert f"{page}:3" in done.stderr
