"""What a user can set, and every check of it. Token counts become page counts here and nowhere else."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import Any

from sparsekv import layer_budgets, settings_file
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.layer_budgets import REST, Budget, Budgets

GROUP_POOLINGS = ("max", "sum", "mean_softmax", "share")
BACKENDS = ("auto", "reference")
PREFILLS = ("dense", "sparse")
MAX_RECENT = 64  # tokens, where `recent` follows the budget
MAX_WHOLE = 2048  # tokens of a sequence that `min_share` spares: there, choosing costs more than reading less saves
_NAMES = ("digest", "policy", "residency")  # of classes in registries


@dataclass(frozen=True)
class SparseConfig:
    """How a model decodes sparsely. Immutable; `with_` makes a changed copy.

    >>> config = SparseConfig(budget=0.1, sinks=16)  # a tenth of the context
    >>> config.budget_pages(32768)  # in pages of 16 tokens
    205
    >>> config.with_(budget=2048).budget_pages(32768)
    128
    >>> config.with_(budget={5: 2048, "rest": 512}).at(5).budget_pages(32768)
    128

    Args:
        budget: tokens a decode step may read per kv head: a whole number, or a fraction of the context in (0, 1].
            A number is rounded down to whole pages. A fraction is one of each sequence's own length, rounded up to
            whole pages, and never goes below the pages that are always read. Layers may differ: a mapping from their
            indices to budgets, where `"rest"` stands for all that it does not name, or a function of the index, which
            is asked once for each layer that can be sparse when a patch or a cache is made. A mapping is kept as
            pairs, `((5, 2048), ("rest", 512))`; `at` has one layer's settings.
        page_size: tokens per page.
        digest: what is kept per page to score it unread (`sparsekv.digests`).
        policy: which pages a step reads (`sparsekv.policies`).
        dense_layers: the first so many of the layers that would be sparse read everything (Quest: two), or the
            indices of such layers. Layers that are not in pages, as those with a sliding window, do not count. Layers
            with a budget of 1.0 and no `min_share` read everything, too.
        sinks: the first tokens of a sequence, always read (StreamingLLM's attention sinks).
        recent: the last tokens of a sequence, always read; the current page always is. Enough for a question:
            a model that loses sight of what it was asked answers something else. None: 64, and never more than an
            eighth of a budget in tokens, so that something is left to choose (`recent_tokens` says how many).
        group_pooling: how the scores of the query heads that share a kv head become one: `max`, `sum`, or
            `mean_softmax` (mean over heads of the softmax over pages), or `share` (the largest share of a head's
            attention that the page is estimated to hold).
        min_share: with `group_pooling="share"`: in sequences of more than 2,048 tokens, pages that are estimated to
            hold less than this share of every head's attention are not read even if the budget has room; 0: they are.
        backend: what runs the ops: `auto` (kernels where there are any) or `reference` (plain torch on any device).
        capture: whether `generate` on a GPU replays its decode step as a CUDA graph where it can.
        fuse: whether the norms and rotary embeddings of a captured step, and on a GPU of a long prompt, run as one
            kernel each, where that gives the same but for the last bits: a millisecond a token less for 32 layers.
            Not with `backend="reference"`.
        max_tokens: the most tokens the page pool of a cache may hold over all its sequences; None: no limit.
        kv: what pages of keys and values look like in memory (`sparsekv.pages.formats`): `plain`, as they are;
            `int8`, a byte to a channel; `int4`, six bits to one of a key and four of a value. A pair, for keys and
            for values, is kept as one name: `("int8", "int4")` is `int8-int4`.
        residency: where pages lie between steps (`sparsekv.pages.residency`).
        prefill: how a prompt is read: `dense`, or `sparse`: each block of its tokens reads the blocks of keys that
            hold `prefill_mass` of its estimated attention, always the first, the one before and its own
            (`sparsekv.policies.prompt_mass`). Layers that `dense_layers` or a budget of 1.0 asks to read everything
            read prompts so, too; with `policy="all"` prompts alone are sparse.
        prefill_mass: that share, in (0, 1].

    Raises:
        ConfigError: a value is not allowed. Names of digests, policies, formats and residencies are resolved against
            their registries when a cache or a patch is made (`UnknownNameError`), since users may register their own.
    """

    budget: Budgets = 2048
    page_size: int = 16
    digest: str = "sign_sketch"
    policy: str = "top_k"
    dense_layers: int | tuple[int, ...] = 0
    sinks: int = 4
    recent: int | None = None
    group_pooling: str = "max"
    min_share: float = 0.0
    backend: str = "auto"
    capture: bool = True
    fuse: bool = True
    max_tokens: int | None = None
    kv: str | tuple[str, str] = "plain"
    residency: str = "device"
    prefill: str = "dense"
    prefill_mass: float = 0.95

    def __post_init__(self) -> None:
        _check_int("page_size", self.page_size, 1, 1024)
        _check_int("sinks", self.sinks, 0)
        if self.recent is not None:
            _check_int("recent", self.recent, 0)
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, self.page_size)
        _check_choice("group_pooling", self.group_pooling, GROUP_POOLINGS)
        _check_share(self.min_share, self.group_pooling)
        _check_choice("backend", self.backend, BACKENDS)
        _check_choice("prefill", self.prefill, PREFILLS)
        _check_mass(self.prefill_mass)
        _check_bool("capture", self.capture)
        _check_bool("fuse", self.fuse)
        _check_dense_layers(self.dense_layers)
        object.__setattr__(self, "kv", _one_name(self.kv))
        object.__setattr__(self, "budget", layer_budgets.canonical(self.budget))
        if isinstance(self.budget, tuple):
            self._by_layer  # noqa: B018  (they are checked when they are made)
        elif not callable(self.budget):
            self._check_budget(self.budget)

    @classmethod
    def of(cls, config: SparseConfig | None = None, **settings: Any) -> SparseConfig:
        """A config from another one and/or single settings.

        Raises:
            UnknownNameError: a setting does not exist.
            ConfigError: a value is not allowed, or `config` is no SparseConfig.
        """
        known = [f.name for f in fields(cls)]
        for name in settings:
            if name not in known:
                raise UnknownNameError("setting", name, known)
        if config is not None and not isinstance(config, cls):
            raise ConfigError(
                f"config={config!r} is not a SparseConfig. Pass patch(model, SparseConfig(budget=...)) "
                "or patch(model, budget=...)."
            )
        return replace(config, **settings) if config is not None else cls(**settings)

    def with_(self, **settings: Any) -> SparseConfig:
        """This config with some settings changed, and checked again.

        Raises:
            ConfigError, UnknownNameError: as `of`.
        """
        return type(self).of(self, **settings)

    @property
    def page_format(self) -> str:
        """The name of the format that `kv` asks for."""
        return str(self.kv)

    # -- files

    def as_dict(self) -> dict[str, Any]:
        """All settings as JSON has them. Raises ConfigError if the budget is a function."""
        by_layer = layer_budgets.as_mapping(self.budget)
        budget = {str(layer): x for layer, x in by_layer.items()} if isinstance(self.budget, tuple) else self.budget
        layers = self.dense_layers
        return {**asdict(self), "budget": budget, "dense_layers": layers if isinstance(layers, int) else list(layers)}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes all settings to a JSON file, which means the same when a later version has other defaults.

        Raises:
            ConfigError: the budget is a function; the config of a patch or a cache has what it gave.
            OSError: the file cannot be written; one that was there is what it was.
        """
        settings_file.write(path, self.as_dict())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseConfig:
        """The settings in a file that `save` has written, or one like it; what it leaves out has its default.

        Raises:
            ConfigError: the file cannot be read or is damaged, or a name or a value is not allowed.
        """
        settings = settings_file.read(path, [field.name for field in fields(cls)])
        for name in ("dense_layers", "kv"):
            if isinstance(settings.get(name), list):
                settings[name] = tuple(settings[name])
        for name in _NAMES:
            if not isinstance(settings.get(name, ""), str):
                raise ConfigError(f"{path}: {name}={settings[name]!r} must be a name.")
        try:
            return cls(**settings)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error

    # -- layers

    def at(self, layer_idx: int) -> SparseConfig:
        """These settings as one layer has them: the budget is a number. A layer that no budget is for, as only those
        have that cannot be sparse, reads everything.

        Raises:
            ConfigError: the budget is a function.
        """
        found = self._by_layer.get(layer_idx) or self._by_layer.get(REST)
        return found or replace(self, budget=1.0, min_share=0.0)

    @property
    def each(self) -> list[SparseConfig]:
        """The settings that layers may have, each with a budget that is a number. Raises as `at`."""
        return list(self._by_layer.values())

    @property
    def plain_budget(self) -> Budget:
        """The budget where it is a number. Raises ConfigError where layers differ."""
        if isinstance(self.budget, (int, float)):
            return self.budget
        raise ConfigError("budget differs by layer: ask config.at(layer_idx) for the settings of one.")

    def for_layers(self, possible: Sequence[int], num_layers: int) -> SparseConfig:
        """These settings for a model: a budget that is a function is asked, and layers that have a budget of their
        own are there.

        Args:
            possible: the layers that can be sparse, in order.

        Raises:
            ConfigError: budgets are given to other layers, or not to all; or one is not allowed.
        """
        budget = self.budget
        settled = self.with_(budget={i: budget(i) for i in possible} or 1.0) if callable(budget) else self
        if isinstance(settled.budget, tuple):
            layer_budgets.check_layers(settled.budget, possible, num_layers)
        return settled

    def up_to(self, num_layers: int) -> SparseConfig:
        """These settings for the first layers of a model: others that are named are left out."""
        budget, dense = self.budget, self.dense_layers
        if isinstance(budget, tuple):
            budget = tuple((layer, x) for layer, x in budget if layer == REST or int(layer) < num_layers) or 1.0
        if isinstance(dense, tuple):
            dense = tuple(layer for layer in dense if layer < num_layers)
        is_same = (budget, dense) == (self.budget, self.dense_layers)
        return self if is_same else self.with_(budget=budget, dense_layers=dense)

    def dense_among(self, layers: Sequence[int]) -> frozenset[int]:
        """Which layers `dense_layers`, or a budget of 1.0, asks to read everything, of those that can be sparse: all
        of a model that are plain full attention, in order."""
        named = self.dense_layers
        asked = layers[:named] if isinstance(named, int) else set(layers) & set(named)
        return frozenset(asked) | {layer for layer in layers if self.at(layer).reads_all}

    @cached_property
    def _by_layer(self) -> dict[int | str, SparseConfig]:
        """The settings of every layer that has a budget of its own, and of the rest."""
        if isinstance(self.budget, (int, float)):
            return {REST: self}
        found = {}
        for layer, budget in layer_budgets.as_mapping(self.budget).items():
            try:
                found[layer] = replace(self, budget=budget)
            except ConfigError as error:
                raise ConfigError(f"budget[{layer!r}]: {error}") from error
        return found

    # -- tokens to pages, where the budget is a number

    def pages_for(self, num_tokens: int) -> int:
        """Pages that hold `num_tokens` tokens."""
        return -(-num_tokens // self.page_size)

    @property
    def recent_tokens(self) -> int:
        """The last tokens that are always read: `recent`, or what follows from the budget."""
        return self._recent_at(self.plain_budget)

    @property
    def forced_pages(self) -> int:
        """The most pages that sinks, recent tokens and the current page can take."""
        return self._forced_at(self.plain_budget)

    @property
    def min_score(self) -> float | None:
        """The least score of a page that is read without being forced; None: any."""
        return math.log(self.min_share) if self.min_share else None

    @property
    def whole_tokens(self) -> int:
        """Sequences of up to so many tokens have no least score."""
        return MAX_WHOLE

    @property
    def is_fraction(self) -> bool:
        """Whether the budget is a fraction of the context."""
        return isinstance(self.plain_budget, float)

    @property
    def reads_all(self) -> bool:
        """Whether the whole context is read, however long it is."""
        return self.is_fraction and self.budget == 1 and not self.min_share

    def budget_pages(self, num_tokens: int) -> int:
        """Pages a step may read per kv head when the sequence holds `num_tokens` tokens."""
        if self.is_fraction:
            return max(self.pages_for(math.ceil(self.plain_budget * num_tokens)), self.forced_pages)
        return int(self.plain_budget) // self.page_size

    def selection_width(self, num_pages: int) -> int:
        """Pages that a step lists of every sequence, for a table of so many: a number that stays the same while the
        sequences grow within it."""
        return min(self.budget_pages(num_pages * self.page_size), num_pages)

    def covers(self, num_pages: int) -> bool:
        """Whether sequences of up to `num_pages` pages are read whole, however long they are: nothing is chosen."""
        return num_pages <= self.covered_pages

    @property
    def covered_pages(self) -> int:
        """The most pages that sequences may have for which `covers` is true."""
        most = sys.maxsize if self.is_fraction and self.budget == 1 else self.budget_pages(0)
        return min(most, self.whole_tokens // self.page_size) if self.min_share else most

    def _recent_at(self, budget: int | float) -> int:
        if self.recent is not None:
            return self.recent
        return MAX_RECENT if isinstance(budget, float) else min(MAX_RECENT, max(budget, 0) // 8)

    def _forced_at(self, budget: int | float) -> int:
        return self.pages_for(self.sinks) + 1 + self.pages_for(max(self._recent_at(budget), 1) - 1)

    def _check_budget(self, budget: object) -> None:
        if isinstance(budget, bool) or not isinstance(budget, (int, float)):
            raise ConfigError(
                f"budget={budget!r} must be a number of tokens (int) or a fraction in (0, 1] (float), or a "
                "mapping or function from layers to such budgets."
            )
        if isinstance(budget, float):
            if not 0 < budget <= 1:
                raise ConfigError(
                    f"budget={budget!r}: a float is a fraction of the context, allowed is (0, 1]; "
                    "for a number of tokens pass an int."
                )
            return
        least: int = budget
        while least < self._forced_at(least) * self.page_size:  # a larger budget can have more recent tokens
            least = self._forced_at(least) * self.page_size
        if budget < least:
            raise ConfigError(
                f"budget={budget} is below the {least} tokens ({self._forced_at(least)} pages of {self.page_size}) "
                f"that sinks={self.sinks}, recent={self._recent_at(least)} and the current page can take. Raise "
                f"budget to at least {least}, or lower sinks, recent or page_size."
            )


def _check_share(share: object, group_pooling: str) -> None:
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 <= share < 1:
        raise ConfigError(f"min_share={share!r} must be a share of a head's attention, at least 0 and below 1.")
    if share and group_pooling != "share":
        raise ConfigError(
            f"min_share={share} is a share of a head's attention, and group_pooling={group_pooling!r} tells none: "
            "set group_pooling='share', or leave min_share out."
        )


def _one_name(kv: object) -> str:
    """The name of a format of keys and values, or of those of keys and of values."""
    names = (kv,) if isinstance(kv, str) else kv
    if not isinstance(names, tuple) or len(names) not in (1, 2) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"kv={kv!r} must be the name of a format, or a pair of such, of keys and of values.")
    return "-".join(dict.fromkeys(names))


def _check_mass(mass: object) -> None:
    if isinstance(mass, bool) or not isinstance(mass, (int, float)) or not 0 < mass <= 1:
        raise ConfigError(f"prefill_mass={mass!r} must be a share of a prompt's attention, above 0 and at most 1.")


def _check_bool(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ConfigError(f"{field}={value!r} must be True or False.")


def _check_int(field: str, value: object, least: int, most: int | None = None) -> None:
    allowed = f"at least {least}" if most is None else f"{least} to {most}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{field}={value!r} must be a whole number, {allowed}.")
    if value < least or (most is not None and value > most):
        raise ConfigError(f"{field}={value} is not allowed: {allowed}.")


def _check_choice(field: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UnknownNameError(field, value, allowed)


def _check_dense_layers(value: object) -> None:
    if not isinstance(value, (int, tuple)):
        raise ConfigError(
            f"dense_layers={value!r} must be a whole number (the first so many layers that would be sparse) or a "
            "tuple of layer indices."
        )
    for layer in value if isinstance(value, tuple) else (value,):
        _check_int("dense_layers", layer, 0)
