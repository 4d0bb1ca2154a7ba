"""What a run of the accuracy harness covers: options, from flags or a file, checked before a model is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from sparsekv import SparseConfig
from sparsekv.command_line import positive, tokens
from sparsekv.config import GROUP_POOLINGS, PREFILLS
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.evaluation import testbed
from sparsekv.evaluation.tasks import FILE_TASKS, TASKS, make_task
from sparsekv.hf import models
from sparsekv.hf.models import AUTO, DTYPES
from sparsekv.hf.wording import CHATS
from sparsekv.pages import FORMATS

from .methods import METHODS, Method, pairs, variants

_LISTS = {
    **dict.fromkeys(("tasks", "methods", "group_pooling", "kv"), str),
    **dict.fromkeys(("budgets", "lengths", "dense_layers"), int),
    "prefill_mass": float,
}
_OFTEN_SINGLE = ("dense_layers", "group_pooling", "kv", "prefill_mass")
_TEXTS, _COUNTS, _FLAGS = ("model", "device"), ("num_examples", "batch_tokens", "batch_rows"), ("probe",)
QUICK = {
    "lengths": (2048,),
    "budgets": (128, 512),
    "num_examples": 4,
    "tasks": ("needle", "multi_key", "variable_tracking", "multi_turn", "perplexity"),
}


@dataclass(frozen=True)
class RunOptions:
    """What to measure.

    Args:
        model: what `models.load` takes.
        tasks, methods: names.
        lengths: tokens of a document.
        budgets: tokens read per kv head; one too small for what is always read is an error.
        num_examples: questions per task, length, method and budget, at least (whole documents).
        seed: another one writes other documents.
        chat: whether questions are put into the tokenizer's chat template: `yes`, `no`, or `auto`, where it has one.
            Perplexity is of plain text in any case.
        page_size, sinks, recent: of the patch.
        dense_layers, group_pooling, kv: of the patch, one or several: methods are measured with each, as far as it
            makes a difference to them. The first is the run's own; a method with another one says so in its name.
        prefill, prefill_mass: `sparse`: methods are measured with dense prompts and with sparse ones of each mass.
        probe: whether to measure attention mass on a few steps.
        batch_tokens, batch_rows: most tokens of documents, and most questions, at once.

    Raises:
        ConfigError, UnknownNameError: a value is not allowed.
    """

    model: str = testbed.NAME
    tasks: tuple[str, ...] = tuple(TASKS)
    methods: tuple[str, ...] = ("dense", "quest", "sketch", "recent", "oracle", "random")
    budgets: tuple[int, ...] = (256, 1024)
    lengths: tuple[int, ...] = (4096,)
    num_examples: int = 32
    seed: int = 0
    chat: str = AUTO
    page_size: int = 16
    dense_layers: int | tuple[int, ...] = 0
    sinks: int = 4
    recent: int = 64
    group_pooling: str | tuple[str, ...] = "max"
    kv: str | tuple[str, ...] = "plain"
    prefill: str = SparseConfig.prefill
    prefill_mass: float | tuple[float, ...] = SparseConfig.prefill_mass
    probe: bool = True
    device: str = "auto"
    dtype: str = "auto"
    batch_tokens: int | None = None
    batch_rows: int = 256

    def __post_init__(self) -> None:
        for name, kind in _LISTS.items():
            object.__setattr__(self, name, _listed(name, getattr(self, name), kind))
        self._check_single_values()
        for name in self.tasks:
            make_task(name)
        for pooling in self.poolings:
            self.base.with_(group_pooling=pooling)
        for name in self._formats:
            FORMATS.get(name)
        for mass in self.masses:
            self.base.with_(prefill=self.prefill, prefill_mass=mass)
        for found, budget in self.cells:
            found.config(self.base, budget)

    def _check_single_values(self) -> None:
        for name in _TEXTS:
            _check(name, getattr(self, name), isinstance(getattr(self, name), str), "a text")
        for name in _COUNTS:
            value = getattr(self, name)
            is_left_out = name == "batch_tokens" and value is None
            _check(name, value, is_left_out or (type(value) is int and value >= 1), "a whole number, at least 1")
        for name in _FLAGS:
            _check(name, getattr(self, name), isinstance(getattr(self, name), bool), "true or false")
        _check("seed", self.seed, type(self.seed) is int, "a whole number")
        _check("dtype", self.dtype, self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        _check("chat", self.chat, self.chat in CHATS, f"one of {', '.join(CHATS)}")

    @property
    def poolings(self) -> tuple[str, ...]:
        """All of `group_pooling`."""
        return cast("tuple[str, ...]", self.group_pooling)

    @property
    def masses(self) -> tuple[float, ...]:
        """All of `prefill_mass`."""
        return cast("tuple[float, ...]", self.prefill_mass)

    @cached_property
    def base(self) -> SparseConfig:
        """The settings that all methods share, but for those that they name."""
        budget = max(self.budgets)
        forced = SparseConfig(
            budget=1 << 30, page_size=self.page_size, sinks=self.sinks, recent=self.recent,
            dense_layers=self._layers[0], group_pooling=self.poolings[0], kv=self._formats[0],
        )  # fmt: skip
        return forced.with_(budget=max(budget, forced.forced_pages * self.page_size))

    @cached_property
    def cells(self) -> list[tuple[Method, int | None]]:
        """Every method with every setting at every budget; dense has none."""
        own = self.poolings, self._layers, self._formats, self.masses if self.prefill == "sparse" else ()
        found = {m.name: m for name in self.methods for m in variants(name, *own)}
        return [(m, b) for m in found.values() for b in ((None,) if m.is_dense else self.budgets)]

    @property
    def fewest_dense(self) -> int:
        """The fewest dense layers of all methods: the others need digests."""
        return min(self._layers[0] if m.dense_layers is None else m.dense_layers for m, _ in self.cells)

    @property
    def _layers(self) -> tuple[int, ...]:
        return cast("tuple[int, ...]", self.dense_layers)

    @property
    def _formats(self) -> tuple[str, ...]:
        return cast("tuple[str, ...]", self.kv)

    def settings(self) -> dict[str, Any]:
        """What the results depend on, for the manifest."""
        hidden = ["model", "device", "batch_tokens", "batch_rows", "probe", "chat"]  # of chat, what it comes to
        hidden += ["prefill", "prefill_mass"]  # which are in the methods' names
        found = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in hidden}
        found |= {name: getattr(self, name)[0] for name in _OFTEN_SINGLE if name in found}  # others are in the names
        found["methods"] = list(dict.fromkeys(method.name for method, _ in self.cells))
        return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def _listed(name: str, value: Any, kind: type) -> tuple[Any, ...]:
    """A setting of several values, without repetitions."""
    if name in _OFTEN_SINGLE and isinstance(value, kind):
        value = (value,)
    if kind is float and isinstance(value, (tuple, list)):
        value = [float(x) if type(x) is int else x for x in value]
    if not isinstance(value, (tuple, list)) or not all(isinstance(x, kind) and type(x) is not bool for x in value):
        what = {str: "names", int: "whole numbers", float: "numbers"}[kind]
        raise ConfigError(f"{name}={value!r} is not allowed: a list of {what}.")
    if not value:
        raise ConfigError(f"{name} is empty: name at least one.")
    least = 0 if name == "dense_layers" else 1
    if kind is int and min(value) < least:
        raise ConfigError(f"{name}={min(value)} is not allowed: at least {least}.")
    return tuple(dict.fromkeys(value))


def _check(name: str, value: object, is_allowed: bool, allowed: str) -> None:
    if not is_allowed:
        raise ConfigError(f"{name}={value!r} is not allowed: {allowed}.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What a run asks, and of whom; what is left out comes from `--config`, then from the defaults."""
    known = RunOptions()
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder of the run; one that is there already is gone on with")
    add(
        "--config", metavar="FILE",
        help="YAML or JSON with any of these options (new_name for --new-name); for run, YAML of several parts, too",
    )  # fmt: skip
    add("--model", metavar="M", help=f"{models.WHAT} (default)")
    files = ", ".join(f"{kind}:FILE" for kind in FILE_TASKS)
    add(
        "--tasks", nargs="+", metavar="T",
        help=f"{', '.join(TASKS)}; {files} (default: all that need no file). FILE: JSON lines for longbench and "
        "ruler, else any text, or `excerpt`, which ships; FILE#N: perplexity and recall score so many tokens, not "
        "256, and so many needles of a document are asked for, not 8",
    )  # fmt: skip
    add(
        "--methods", nargs="+", metavar="M",
        help=f"{', '.join(METHODS)}; DIGEST/POLICY: {', '.join(pairs())}; and settings, as quest+sum+dense0 "
        f"(default: {' '.join(known.methods)})",
    )  # fmt: skip
    add("--budgets", nargs="+", type=tokens, metavar="TOKENS", help="read per kv head (default 256 1024)")
    add("--lengths", nargs="+", type=tokens, metavar="TOKENS", help="of a document, 32k or 32768 (default 4k)")
    add("--examples", dest="num_examples", type=positive, metavar="N", help="questions per cell (default 32)")
    add("--seed", type=int, help="another number writes other documents (default 0)")
    add("--chat", choices=CHATS, help="put questions into the model's chat template (default auto: if it has one)")
    add("--page-size", type=positive, metavar="TOKENS", help="tokens per page (default 16)")
    add(
        "--dense-layers", nargs="+", type=int, metavar="N",
        help="the first so many layers read everything (default 0); of several, methods are measured with each",
    )  # fmt: skip
    add("--sinks", type=int, metavar="TOKENS", help="first tokens that are always read (default 4)")
    add(
        "--recent", type=int, metavar="TOKENS",
        help="last tokens that are always read; at most a quarter of the budget (default 64)",
    )  # fmt: skip
    poolings = ", ".join(GROUP_POOLINGS)
    add(
        "--group-pooling", nargs="+", metavar="P",
        help=f"of the scores of a kv head's query heads: {poolings} (default max); of several, digests with each",
    )  # fmt: skip
    add(
        "--kv", nargs="+", metavar="FORMAT",
        help=f"of keys and values: {', '.join(FORMATS)} (default plain); of several, methods with each: dense+int8",
    )  # fmt: skip
    add(
        "--prefill", choices=PREFILLS,
        help="sparse: all methods again after prompts that are read sparsely (default dense)",
    )  # fmt: skip
    add(
        "--prefill-mass", nargs="+", type=float, metavar="SHARE",
        help="of a prompt's attention that sparse ones read (default .95); of several, methods with each",
    )  # fmt: skip
    models.add_arguments(parser, default=None)
    add("--quick", action="store_true", help="a few examples of a few tasks at 2k: a minute or two on two cores")


def add_work_arguments(parser: argparse.ArgumentParser) -> None:
    """How a run goes about it, which changes no answer."""
    add = parser.add_argument
    add("--no-probe", dest="probe", action="store_false", default=None, help="do not measure attention mass")
    add("--batch-tokens", type=tokens, metavar="N", help="tokens of documents at once (default: by the device)")
    rows = RunOptions.batch_rows
    add("--batch-rows", type=positive, metavar="N", help=f"questions at once (default {rows})")


def parts_of(args: argparse.Namespace) -> list[RunOptions]:
    """Flags over `--config` over `--quick` over the defaults, for every part of the file: parts are divided by a line
    `---`, measured in their order, and as the first one where they say nothing else.

    Raises:
        ConfigError, UnknownNameError: a value is not allowed, or the file cannot be used.
    """
    known = {f.name for f in fields(RunOptions)}
    parts = _from_file(Path(args.config), known) if args.config else [{}]
    flags = {name: value for name, value in vars(args).items() if name in known and value is not None}
    quick = QUICK if args.quick else {}
    found = [_made({**quick, **parts[0], **part, **flags}) for part in parts]
    if len({(part.model, part.device, part.dtype) for part in found}) > 1:
        raise ConfigError(f"--config: {args.config}: model, device and dtype are those of the first part.")
    return found


def _made(given: Mapping[str, Any]) -> RunOptions:
    settled: dict[str, Any] = {name: tuple(x) if isinstance(x, list) else x for name, x in given.items()}
    return RunOptions(**settled)


def options_of(args: argparse.Namespace) -> RunOptions:
    """`parts_of`, where there may be one only.

    Raises:
        ConfigError, UnknownNameError: as `parts_of`, or there are several.
    """
    first, *more = parts_of(args)
    if more:
        raise ConfigError(f"--config: {args.config} has {1 + len(more)} parts, which only `eval run` takes.")
    return first


def _from_file(path: Path, known: set[str]) -> list[dict[str, Any]]:
    import yaml

    try:
        parts = list(yaml.safe_load_all(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"--config: {path} cannot be read: {error}") from error
    return [_part(path, content, known) for content in parts or [None]]


def _part(path: Path, content: Any, known: set[str]) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise ConfigError(f"--config: {path} must hold names and values, as `tasks: [needle, passkey]`.")
    for name in content:
        if name not in known:
            # Not as it is: the command line is right, so the exit code is not that of a misspelt one.
            raise ConfigError(str(UnknownNameError(f"{path}: option", name, known)))
    return {name: _as_tokens(name, value) for name, value in content.items()}


def _as_tokens(name: str, value: Any) -> Any:
    """Lists stay lists, single values of lists become one; `32k` is a number."""
    if name == "batch_tokens":
        return None if value is None else _number_of_tokens(name, value)
    if name == "chat" and isinstance(value, bool):  # YAML's yes and no
        return "yes" if value else "no"
    if name not in _LISTS:
        return value
    values: Sequence[Any] = value if isinstance(value, list) else [value]
    return [_number_of_tokens(name, x) for x in values] if name in ("budgets", "lengths") else list(values)


def _number_of_tokens(name: str, value: object) -> int:
    try:
        return tokens(str(value))
    except argparse.ArgumentTypeError as error:
        raise ConfigError(f"{name}: {error}") from error
