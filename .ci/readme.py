"""Reads the code blocks of a Markdown file, and runs the shell blocks that ask for it.

    python .ci/readme.py README.md

A comment on the line before a block (a blank line may stand between) says what becomes of it:

- ```` ```bash ```` after `<!-- run -->`: run here, from the repository root, with `bash -euo pipefail`. The other
  shell blocks are not: they clone, install or need a GPU.
- ```` ```python ````: run by tests/test_readme.py, but for those after `<!-- not run: the reason -->`.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

BLOCK = re.compile(
    r"^(?:<!--\s*(?P<comment>(?:(?!-->).)*?)\s*-->\n\n?)?^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```\s*$",
    re.M | re.S,
)
SECTION = re.compile(r"^## (?P<title>.*)$", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    language: str
    code: str
    line: int  # of its first line of code
    section: str  # the last `## ` heading above it
    comment: str  # of the HTML comment just before it


def blocks(markdown: str) -> list[Block]:
    """The fenced code blocks that name their language, in order."""
    found = []
    for match in BLOCK.finditer(markdown):
        sections = [heading["title"] for heading in SECTION.finditer(markdown, 0, match.start())]
        found.append(
            Block(
                language=match["language"],
                code=match["code"],
                line=markdown.count("\n", 0, match.start("code")) + 1,
                section=sections[-1] if sections else "",
                comment=match["comment"] or "",
            )
        )
    return found


def main(path: Path) -> None:
    """Run the shell blocks that are marked for it; the first that fails ends the program with its exit code."""
    ready = [block for block in blocks(path.read_text()) if block.language == "bash" and block.comment == "run"]
    if not ready:
        sys.exit(f"{path}: no ```bash block after <!-- run -->, so there is no quickstart to check")
    for block in ready:
        print(f"-- {path}:{block.line}\n{block.code}", flush=True)
        started = time.monotonic()
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block.code], stdin=subprocess.DEVNULL)
        if done.returncode:
            print(f"{path}:{block.line}: exit code {done.returncode}", file=sys.stderr)
            sys.exit(done.returncode)
        print(f"-- {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
