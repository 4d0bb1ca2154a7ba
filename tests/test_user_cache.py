"""Where things are kept, in folders that are whole or not there."""

from pathlib import Path

import pytest

from sparsekv.user_cache import appearing, cache_directory


@pytest.mark.parametrize(
    ("environment", "directory"),
    [
        ({"SPARSEKV_CACHE_DIR": "/a", "XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/a/kernels"),
        ({"SPARSEKV_CACHE_DIR": "~/a", "HOME": "/c"}, "/c/a/kernels"),
        ({"XDG_CACHE_HOME": "/b", "HOME": "/c"}, "/b/sparsekv/kernels"),
        ({"SPARSEKV_CACHE_DIR": "", "XDG_CACHE_HOME": "", "HOME": "/c"}, "/c/.cache/sparsekv/kernels"),
    ],
)
def test_where_the_cache_is(environment: dict[str, str], directory: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SPARSEKV_CACHE_DIR", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache_directory("kernels") == Path(directory)


def test_a_folder_appears_when_it_is_whole(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "one"
    with appearing(folder) as (new, scratch):
        (scratch / "fetched").touch()
        (new / "file").write_text("whole")
        assert not folder.exists()
    assert [path.name for path in folder.parent.iterdir()] == ["one"]
    assert (folder / "file").read_text() == "whole"


def test_what_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with appearing(tmp_path / "one") as (new, _):
            (new / "file").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fill()
    assert list(tmp_path.iterdir()) == []


def test_of_two_processes_the_faster_ones_folder_stays(tmp_path: Path) -> None:
    folder = tmp_path / "one"
    with appearing(folder) as (new, _):
        (new / "file").write_text("slow")
        with appearing(folder) as (other, _):
            (other / "file").write_text("fast")
    assert [path.name for path in tmp_path.iterdir()] == ["one"]
    assert (folder / "file").read_text() == "fast"
