"""Names the committed results that were measured with other kernels than today's, and the commands to make them anew.

python -m tools.release_check  # the exit code is 1 if there are any
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

from sparsekv.evaluation.committed import RESULTS
from sparsekv.ops import compiler

from .readme import of_today


def stale(folder: Path, today: str) -> Iterator[str]:
    """A line for each command of each file; what was measured without a GPU ran no kernel.

    Args:
        today: fingerprint of the kernels that there are now.
    """
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        rows = [row["measured"] for row in content.get("rows", []) if row.get("measured")]  # may be of several runs
        for run in {(run["command"], run.get("kernels")): run for run in rows or [content]}.values():
            if run["gpu"] and run.get("kernels") != today:
                what = f"kernels {run.get('kernels', 'unknown')}, {run['date']}, {run['gpu']}"
                yield f"{path.name}: {what}\n    {of_today(run['command'])}"


def main() -> int:
    """Prints them; returns the exit code."""
    today = compiler.fingerprint()
    found = list(stale(RESULTS, today))
    print(*found, f"Today's kernels are {today}; {len(found) or 'no'} measurements are of others.", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
