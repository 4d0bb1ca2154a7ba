"""A run's manifest: it refuses to mix runs, and keeps what is known of each of its parts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparsekv.digests import DIGESTS, register
from sparsekv.digests.minmax import MinMax
from sparsekv.errors import ConfigError
from sparsekv.evaluation.accuracy.manifest import check_manifest, model_hash, save_manifest
from sparsekv.evaluation.accuracy.methods import METHODS, method


def manifest(**changes: Any) -> dict[str, Any]:
    settings = {"tasks": ["needle"], "lengths": [1024], "methods": ["quest"], "budgets": [64], "num_examples": 8}
    settings |= {"seed": 0, "page_size": 16} | changes
    return {"command": "a command", "model": {"name": "m", "sha256": "0"}, "settings": settings}


def test_a_run_may_grow(tmp_path: Path) -> None:
    save_manifest(tmp_path / "run", manifest())
    save_manifest(tmp_path / "run", manifest(tasks=["passkey"], budgets=[64, 128], num_examples=4))
    settings = json.loads((tmp_path / "run" / "manifest.json").read_text())["settings"]
    assert settings["tasks"] == ["needle", "passkey"]
    assert settings["budgets"] == [64, 128]
    assert settings["num_examples"] == 8


@pytest.mark.parametrize("use", [save_manifest, check_manifest])
@pytest.mark.parametrize("changes", [{"seed": 1}, {"page_size": 32}])
def test_a_run_of_something_else_is_refused(changes: dict[str, Any], use: Any, tmp_path: Path) -> None:
    save_manifest(tmp_path, manifest())
    before = (tmp_path / "manifest.json").read_bytes()
    with pytest.raises(ConfigError, match=f"of another run \\({next(iter(changes))} was"):
        use(tmp_path, manifest(**changes))
    assert (tmp_path / "manifest.json").read_bytes() == before


def test_checking_writes_nothing(tmp_path: Path) -> None:
    check_manifest(tmp_path / "run", manifest())
    assert not (tmp_path / "run").exists()


def test_the_circumstances_of_all_runs_are_kept(tmp_path: Path) -> None:
    """Each once. A manifest without them told of the last run only."""
    first = manifest() | {"gpu": "one", "versions": {"torch": "1"}}
    (tmp_path / "manifest.json").write_text(json.dumps(first))
    for gpu in ("two", "two", "three"):
        save_manifest(tmp_path, manifest() | {"gpu": gpu, "versions": {"torch": "1"}})
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert [run["gpu"] for run in content["runs"]] == ["one", "two", "three"]
    assert content["runs"][0] == {"command": "a command", "gpu": "one", "versions": {"torch": "1"}}
    assert content["gpu"] == "three"


@pytest.mark.parametrize(
    ("before", "here", "is_refused"),
    [({}, {"f": "2"}, False), ({"f": "1"}, {}, False), ({"f": "1"}, {"f": "2"}, True)],
)
def test_a_task_of_other_content_is_refused(before: Any, here: Any, is_refused: bool, tmp_path: Path) -> None:
    """Where its content was told; other tasks may come."""
    save_manifest(tmp_path, manifest() | {"data": before})
    if is_refused:
        with pytest.raises(ConfigError, match=r"of another run \(the content of f was '1' and is '2'"):
            save_manifest(tmp_path, manifest() | {"data": here})
        return
    save_manifest(tmp_path, manifest() | {"data": here})
    assert json.loads((tmp_path / "manifest.json").read_text())["data"] == before | here


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "is no manifest of a run"),
        ('{"model": {}, "settings": {"tasks": []}}', "is no manifest of a run"),
        ('{"model": {}, "settings": 3}', "is no manifest of a run"),
        ("[]", "must hold names and values"),
        ("{", "is no JSON"),
    ],
)
def test_what_is_no_manifest_is_named(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(ConfigError, match=rf"manifest\.json {message}"):
        save_manifest(tmp_path, manifest())
    assert (tmp_path / "manifest.json").read_text() == text


def test_the_hash_tells_weights_apart() -> None:
    torch.manual_seed(0)
    one, same = torch.nn.Linear(9, 5), torch.nn.Linear(9, 5)
    same.load_state_dict(one.state_dict())
    assert model_hash(one) == model_hash(same)
    with torch.no_grad():
        same.weight[0, 0] += 1
    assert model_hash(one) != model_hash(same)


def test_the_code_of_a_digest_that_does_not_ship_is_told_by_its_hash() -> None:
    def own_code(program: str) -> str | None:
        namespace: dict[str, Any] = {"register": register, "MinMax": MinMax, "__name__": "somewhere"}
        exec(program, namespace)
        try:
            return method("tried/top_k").own_code()
        finally:
            DIGESTS.remove("tried")

    program = "@register('tried')\nclass Tried(MinMax):\n    def score(self, query, summary, state): return {}"
    first, again, changed = (own_code(program.format(number)) for number in (1, 1, 2))
    assert first == again != changed
    assert None not in (first, changed)
    later = [known.name for known in METHODS.values() if known.own_code() is not None]
    assert later == [
        name for name, known in METHODS.items() if known.digest and DIGESTS.get(known.digest).revision > 1
    ]


def test_a_method_of_other_code_is_refused(tmp_path: Path) -> None:
    save_manifest(tmp_path, manifest() | {"code": {"tried/top_k": "1"}})
    save_manifest(tmp_path, manifest() | {"code": {"other/top_k": "2"}})
    with pytest.raises(ConfigError, match="the code of tried/top_k was '1' and is '2'"):
        check_manifest(tmp_path, manifest() | {"code": {"tried/top_k": "2"}})
