"""What is public is documented, and every example in a docstring runs and prints what it says."""

import doctest
import importlib
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SECTIONS = "Args|Attributes|Raises|Returns|Yields"


def api() -> ModuleType:
    spec = importlib.util.spec_from_file_location("api", ROOT / ".ci" / "api.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def modules_with_examples() -> list[str]:
    paths = [*ROOT.glob("sparsekv/**/*.py"), *ROOT.glob("evaluation/**/*.py")]
    names = []
    for path in sorted(path for path in paths if ">>> " in path.read_text(encoding="utf-8")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        parts = ["sparsekv", *parts] if parts[0] == "evaluation" else parts
        names.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return names


@pytest.mark.parametrize("name", modules_with_examples())
def test_examples_run_as_they_are_shown(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    found = doctest.testmod(importlib.import_module(name), optionflags=flags)
    assert found.attempted
    assert not found.failed


def test_no_example_is_hidden_from_this_test() -> None:
    """An indented block of code that is not in `>>>` form would never be run."""
    code = re.compile(r"^ {4,}(import sparsekv|from sparsekv|patch = |model\.generate)", re.M)
    paths = [*ROOT.glob("sparsekv/**/*.py"), *ROOT.glob("evaluation/**/*.py")]
    for path in paths:
        for name, text in docstrings(path):
            assert not code.search(text), f"{path.name}: {name}"


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    import ast

    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            yield getattr(node, "name", "module"), ast.get_docstring(node) or ""


def public_things() -> Iterator[tuple[str, Any]]:
    for module_name in api().MODULES:
        module = importlib.import_module(module_name)
        yield module_name, module
        for name in getattr(module, "__all__", []):
            thing = getattr(module, name)
            if not inspect.ismodule(thing) and (inspect.isclass(thing) or inspect.isfunction(thing)):
                yield f"{module_name}.{name}", thing
                if inspect.isclass(thing):
                    yield from methods_of(f"{module_name}.{name}", thing)


def methods_of(where: str, cls: type) -> Iterator[tuple[str, Any]]:
    """Of its own: those it inherits from transformers are documented there."""
    for name, member in vars(cls).items():
        function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
        if not name.startswith("_") and inspect.isfunction(function):
            yield f"{where}.{name}", function


@pytest.mark.parametrize(("name", "thing"), list(public_things()), ids=lambda x: x if isinstance(x, str) else "")
def test_what_is_public_is_documented(name: str, thing: Any) -> None:
    text = inspect.getdoc(thing)
    assert text, f"{name} has no docstring"
    for section in re.findall(rf"^({SECTIONS}):$", text, re.M):
        assert re.search(rf"^{section}:\n +\S", text, re.M), f"{name}: {section} is empty"
