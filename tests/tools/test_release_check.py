"""Results that were measured with other kernels than today's are named, with what makes them anew."""

import json
from pathlib import Path

from tools import release_check


def test_each_measurement_of_other_kernels_is_named(tmp_path: Path) -> None:
    def run(command: str, **kernels: str) -> dict:
        return {"command": command, "date": "2026-01-02", "gpu": "a GPU", **kernels}

    parts = [run("a", kernels="a"), run("a", kernels="a"), run("a", kernels="b"), run("b", kernels="b")]
    files = {
        "unknown": run("python -m evaluation.speed attention"),
        "today": run("sparsekv bench attention", kernels="b"),
        "cpu": {**run("sparsekv bench attention --device cpu"), "gpu": None, "rows": []},
        "parts": {**run("b"), "rows": [{"measured": part} for part in parts]},
    }
    for name, content in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    assert list(release_check.stale(tmp_path, "b")) == [
        "parts.json: kernels a, 2026-01-02, a GPU\n    a",
        "unknown.json: kernels unknown, 2026-01-02, a GPU\n    sparsekv bench attention",
    ]
