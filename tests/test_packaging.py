"""What is built: the same bytes every time, complete, and at work in an environment that has no checkout."""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# Where each folder of the repository lies in the wheel.
FOLDERS = {"sparsekv": "sparsekv", "evaluation": "sparsekv/evaluation", "cuda": "sparsekv/cuda"}
BUILD_LEFTOVERS = (".git", ".venv*", "build", "dist", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis")
DEMO = ("demo", "--quick")

# One worker builds the wheel for all of these.
pytestmark = [pytest.mark.wide, pytest.mark.xdist_group("packaging")]


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command that must succeed, run without the checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(directory: Path, umask: int) -> dict[str, bytes]:
    """The wheel and the sdist it is made from, built in a copy: nothing of an earlier build gets in."""
    tree = directory / "tree"
    shutil.copytree(ROOT, tree, ignore=shutil.ignore_patterns(*BUILD_LEFTOVERS), copy_function=shutil.copyfile)
    command = f"umask {umask:03o}; SOURCE_DATE_EPOCH=1700000000 {sys.executable} tree/.ci/build.py dist"
    run("bash", "-c", command, cwd=directory)
    return {path.name: path.read_bytes() for path in (directory / "dist").iterdir()}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheel")
    build(directory, umask=0o022)
    (built,) = directory.glob("dist/*.whl")
    return built


def test_whoever_builds_gets_the_same_bytes(wheel: Path, tmp_path: Path) -> None:
    first = {path.name: path.read_bytes() for path in wheel.parent.iterdir()}
    assert [name.rpartition(".")[2] for name in sorted(first)] == ["whl", "gz"]
    assert build(tmp_path, umask=0o002) == first


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
            # Raw answers (.xz) and pictures stay in the repository: for readers, not for users of the wheel.
            if path.is_file() and path.suffix not in (".pyc", ".xz", ".png") and not path.name.startswith("."):
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


def test_the_workflow_runs_what_is_run_before_a_change_is_handed_in() -> None:
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert job["strategy"]["matrix"]["python"] == ["3.10", "3.13", "3.14"]
    assert job["steps"][-1] == {"run": "bash .ci/run"}


def test_every_linter_of_make_runs_before_a_commit() -> None:
    hooks = [hook for repo in yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
             for hook in repo["hooks"]]  # fmt: skip
    recipe = (ROOT / "Makefile").read_text().partition("\nlint:")[2].partition("\n\n")[0]
    linters = re.findall(r"\$\(BIN\)/([\w-]+(?: [a-z]+)?)", recipe)
    assert linters == ["ruff check", "ruff format", "clang-format", "mypy"]
    assert all(any(hook["entry"].startswith(f".venv/bin/{linter}") for hook in hooks) for linter in linters)


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


def test_the_readmes_quickstart_runs_from_the_wheel(environment: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    whole = next(block for block in blocks if "testbed.load" in block)
    printed = run(environment / "bin" / "python", "-c", whole, cwd=tmp_path)
    said, expected = printed.splitlines()[0].split(" | expected: ")
    assert expected in said


def test_users_programs_are_checked_against_our_types(environment: Path, tmp_path: Path) -> None:
    """What extends the package, and a wrong use of it: an ignored error that is none would be one."""
    for example in (ROOT / "tests" / "extending").glob("[!t]*.py"):
        shutil.copy(example, tmp_path)
    (tmp_path / "wrong.py").write_text(
        "import sparsekv\n\n"
        "def pages(patch: sparsekv.Patch) -> str:\n"
        "    return patch.stats.pages_read  # type: ignore[return-value]\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\nwarn_unused_ignores = True\ncheck_untyped_defs = True\n"
        "[mypy-torch.*,transformers.*]\nfollow_imports = skip\n"  # theirs take half a minute
    )
    run(environment / "bin" / "python", "-m", "mypy", *sorted(tmp_path.glob("*.py")), cwd=tmp_path)
