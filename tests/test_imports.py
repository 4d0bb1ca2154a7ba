"""Who may import whom, read from the sources: an arrow that runs back fails here.

Every import counts: at the top of a file, inside a function, and under `if TYPE_CHECKING:` too, since a name that is
needed to annotate a signature ties two files together as much as one that is called.
"""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From the bottom up: a layer may import the layers above its line here, not its neighbours and not what comes below.
# "sparsekv" is the package's own __init__.py, the public names.
LAYERS: tuple[frozenset[str], ...] = tuple(
    frozenset(layer.split())
    for layer in (
        "errors",
        "layer_budgets settings_file",
        "config registry",
        "command_line",
        "ops",
        "digests doctor",
        "policies",
        "pages",
        "cache",
        "hf",
        "sparsekv",
        "testing",
        "evaluation",
        "commands",
        "cli",
        "__main__",
        "tools",
    )
)
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
ONLY_IMPORTED_BY = {"doctor": {"cli"}}
# What a page is, how it is scored and which ones are read has nothing to do with transformers.
FREE_OF_TRANSFORMERS = {name for name, rank in RANK.items() if rank <= RANK["pages"]} - {"doctor"}


def sources() -> list[Path]:
    return sorted(path for room in ("sparsekv", "evaluation", "tools") for path in ROOT.glob(f"{room}/**/*.py"))


def module_name(path: Path) -> str:
    """`sparsekv/ops/schema.py` -> `sparsekv.ops.schema`; evaluation/ is `sparsekv.evaluation` once installed."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "evaluation":
        parts.insert(0, "sparsekv")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def component(module: str) -> str:
    """`sparsekv.ops.schema` -> `ops`, `tools.testbed.train` -> `tools`; `sparsekv` itself stays."""
    top, *rest = module.split(".")
    return rest[0] if rest and top == "sparsekv" else top


MODULES = {module_name(path) for path in sources()}


def imported_modules(tree: ast.AST, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Every module that the file imports, with the line; `from a import b` is `a.b` where that is a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                parents = parents[: len(parents) - node.level + is_package]
                base = ".".join([*parents, base] if base else parents)
            for alias in node.names:
                name = f"{base}.{alias.name}"
                yield (name if name in MODULES else base), node.lineno


def complaints(source: str, module: str, where: str, is_package: bool = False) -> list[str]:
    here = component(module)
    if here not in RANK:
        return [f"{where}: {module} is in no layer yet: give {here!r} its place in LAYERS of {Path(__file__).name}"]
    found = []
    for imported, line in imported_modules(ast.parse(source), module, is_package):
        top, there = imported.split(".")[0], component(imported)
        if top == "evaluation":
            found.append(f"{where}:{line}: import it as sparsekv.evaluation: evaluation exists only in a checkout")
        if top == "transformers" and here in FREE_OF_TRANSFORMERS:
            found.append(f"{where}:{line}: {here} must not know transformers")
        if top not in ("sparsekv", "tools") or there == here:
            continue
        allowed = RANK.get(there, -1) < RANK[here] and here in ONLY_IMPORTED_BY.get(there, {here})
        if not allowed:
            found.append(f"{where}:{line}: {here} must not import {there} ({imported})")
    return found


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    found = complaints(
        path.read_text(), module_name(path), str(path.relative_to(ROOT)), is_package=path.name == "__init__.py"
    )
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("sparsekv.cli", "from sparsekv.evaluation import runner", True),
        ("sparsekv.cli", "from sparsekv.commands import chat", True),
        ("sparsekv.commands.chat", "from sparsekv.evaluation import asking", True),
        ("sparsekv.commands.chat", "import sparsekv.cli", False),
        ("sparsekv.evaluation.speed", "from sparsekv.commands import generate", False),
        ("sparsekv.evaluation.speed", "from sparsekv.command_line import Parser", True),
        ("sparsekv.command_line", "from sparsekv.evaluation import report", False),
        ("sparsekv.evaluation.accuracy.runner", "import sparsekv", True),
        ("sparsekv.evaluation.accuracy.runner", "import sparsekv.cli", False),
        ("sparsekv.evaluation.accuracy.runner", "import evaluation.tasks", False),
        ("sparsekv.hf.patch", "from sparsekv.cache.paged_cache import PagedCache", True),
        ("sparsekv.cache.paged_cache", "from ..hf import patch", False),
        ("sparsekv.cache.paged_cache", "from sparsekv import ops", True),
        ("sparsekv.cache.paged_cache", "from sparsekv import patch", False),
        ("sparsekv.cache.paged_cache", "from .paged_layer import PagedLayer", True),
        ("sparsekv.pages.page_store", "from sparsekv.cache import DecodeStats", False),
        ("sparsekv.pages.page_store", "import transformers", False),
        ("sparsekv.policies.base", "from sparsekv.pages import PageStore", False),
        ("sparsekv.digests.minmax", "from sparsekv.policies import top_k", False),
        ("sparsekv.ops.reference", "def f():\n    import sparsekv.config", True),
        ("sparsekv.ops.reference", "def f():\n    from sparsekv import digests", False),
        ("sparsekv.config", "if TYPE_CHECKING:\n    from sparsekv.hf.patch import Report", False),
        ("sparsekv.config", "from sparsekv.errors import ConfigError", True),
        ("sparsekv.errors", "from sparsekv.config import SparseConfig", False),
        ("sparsekv.ops.reference", "import transformers.cache_utils", False),
        ("sparsekv.hf.patch", "from sparsekv.doctor import report", False),
        ("sparsekv.hf.patch", "import transformers", True),
        ("sparsekv.something_new", "", False),
        ("tools.testbed.train", "import sparsekv.cli, sparsekv.evaluation.testbed", True),
        ("sparsekv.commands.demo", "from tools.testbed import train", False),
    ],
)
def test_the_check_itself(module: str, source: str, allowed: bool) -> None:
    found = complaints(source, module, "file.py")
    assert (found == []) == allowed, found
    assert all(line.startswith("file.py:") for line in found)


SNAPSHOT = """
import json, random
import numpy, torch, transformers
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

def snapshot():
    attributes = {
        f"{cls.__name__}.{name}": id(value)
        for cls in (transformers.GenerationMixin, transformers.PreTrainedModel, transformers.Cache,
                    transformers.DynamicCache, torch.nn.Module, torch.Tensor)
        for name, value in vars(cls).items()
    }
    return {
        **attributes,
        "attention": {name: id(ALL_ATTENTION_FUNCTIONS[name]) for name in ALL_ATTENTION_FUNCTIONS},
        "masks": {name: id(ALL_MASK_ATTENTION_FUNCTIONS[name]) for name in ALL_MASK_ATTENTION_FUNCTIONS},
        "dtype": str(torch.get_default_dtype()),
        "device": str(torch.get_default_device()),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "matmul": torch.get_float32_matmul_precision(),
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "random": (str(random.getstate()), str(numpy.random.get_state()), torch.get_rng_state().tolist()),
    }

before = snapshot()
import sparsekv
import sparsekv.evaluation
after = snapshot()
print(json.dumps([name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]))
"""


def test_importing_changes_nothing_in_transformers_or_torch() -> None:
    printed = subprocess.run(
        [sys.executable, "-c", SNAPSHOT], capture_output=True, text=True, check=True, timeout=120
    ).stdout
    assert json.loads(printed.splitlines()[-1]) == []
