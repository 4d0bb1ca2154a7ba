"""The wheel: built from the source distribution, complete, and at work in an environment that has no checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where each folder of the repository lies in the wheel.
FOLDERS = {"sparsekv": "sparsekv", "evaluation": "sparsekv/evaluation", "cuda": "sparsekv/cuda"}
BUILD_LEFTOVERS = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
DEMO = ("demo", "--quick")

# One worker builds the wheel for all of these.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("packaging")]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built in a copy, so that nothing of an earlier build gets in."""
    directory = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT, directory / "tree", ignore=shutil.ignore_patterns(*BUILD_LEFTOVERS))
    # By default `build` makes the wheel from the sdist it has just made: so the sdist is complete too.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", directory, directory / "tree", cwd=directory)
    (built,) = directory.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that has the wheel, and of this environment what the wheel needs."""
    directory = tmp_path_factory.mktemp("environment")
    run(sys.executable, ROOT / ".ci" / "layered_venv.py", directory, cwd=directory)
    python = directory / "bin" / "python"
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", "--ignore-installed", wheel, cwd=directory)
    return directory


def shipped() -> Iterator[str]:
    for folder, place in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*")):
            # Raw answers (.xz) stay in the repository: a run can go on from them, a user of the wheel will not.
            if path.is_file() and path.suffix not in (".pyc", ".xz") and not path.name.startswith("."):
                yield f"{place}/{path.relative_to(ROOT / folder).as_posix()}"


def test_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    inside = set(zipfile.ZipFile(wheel).namelist())
    missing = [name for name in shipped() if name not in inside]
    assert not missing, f"setup.cfg lists no package or no package data for {missing}"


def test_wheel_has_what_cannot_be_done_without(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    assert {"sparsekv/py.typed", "sparsekv/cuda/README.md", "sparsekv/evaluation/__init__.py"} <= set(inside)
    assert any(name.startswith("sparsekv/evaluation/testbed/") and name.endswith(".safetensors") for name in inside)


def test_wheel_has_nothing_else(wheel: Path) -> None:
    inside = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in inside} == {"sparsekv"}
    assert "sparsekv/cuda/__init__.py" not in inside
    strangers = [name for name in inside if ".dist-info/" not in name and name not in set(shipped())]
    assert not strangers


def test_cuda_folder_does_not_hide_nvidias_package() -> None:
    assert not (ROOT / "cuda" / "__init__.py").exists()


def test_the_wheel_is_what_runs(environment: Path, tmp_path: Path) -> None:
    program = (
        "import sparsekv, sparsekv.evaluation as e, sparsekv.ops as o\nfor m in sparsekv, e, o: print(m.__file__)"
    )
    printed = run(environment / "bin" / "python", "-c", program, cwd=tmp_path)
    for path in printed.splitlines():
        assert Path(path).is_relative_to(environment)


@pytest.mark.parametrize("arguments", [("doctor",), DEMO], ids=" ".join)
def test_commands_run_from_the_wheel(arguments: tuple[str, ...], environment: Path, tmp_path: Path) -> None:
    assert run(environment / "bin" / "sparsekv", *arguments, cwd=tmp_path)
