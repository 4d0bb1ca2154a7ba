"""Every setting is checked where it is set, and every message names the field, the value and what is allowed."""

import dataclasses
import json
import math
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekv.config import BACKENDS, GROUP_POOLINGS, SparseConfig
from sparsekv.errors import ConfigError, UnknownNameError


@pytest.mark.parametrize(
    ("field", "value", "parts"),
    [
        ("page_size", 0, ["page_size=0", "1 to 1024"]),
        ("page_size", 1025, ["page_size=1025", "1 to 1024"]),
        ("page_size", 16.0, ["page_size=16.0", "whole number", "1 to 1024"]),
        ("page_size", True, ["page_size=True", "whole number"]),
        ("page_size", "16", ["page_size='16'", "whole number"]),
        ("sinks", -1, ["sinks=-1", "at least 0"]),
        ("sinks", None, ["sinks=None", "whole number"]),
        ("recent", -1, ["recent=-1", "at least 0"]),
        ("recent", 0.5, ["recent=0.5", "whole number"]),
        ("max_tokens", 15, ["max_tokens=15", "at least 16"]),
        ("max_tokens", 1e6, ["max_tokens=1000000.0", "whole number"]),
        (
            "group_pooling",
            "mean",
            ["group_pooling='mean'", "Did you mean 'max' or 'mean_softmax'?", "max, mean_softmax, share, sum"],
        ),
        ("group_pooling", None, ["group_pooling=None", "max, mean_softmax, share, sum"]),
        ("backend", "cuda", ["backend='cuda'", "auto, reference"]),
        ("backend", "refrence", ["Did you mean 'reference'?"]),
        ("prefill", "spares", ["prefill='spares'", "Did you mean 'sparse'?"]),
        ("prefill_mass", 0, ["prefill_mass=0", "above 0 and at most 1"]),
        ("prefill_mass", 1.5, ["prefill_mass=1.5", "above 0 and at most 1"]),
        ("prefill_mass", True, ["prefill_mass=True", "share"]),
        ("prefill_mass", math.nan, ["prefill_mass=nan", "share"]),
        ("dense_layers", -1, ["dense_layers=-1", "at least 0"]),
        ("dense_layers", (0, -2), ["dense_layers=-2", "at least 0"]),
        ("dense_layers", (0, "1"), ["dense_layers='1'", "whole number"]),
        ("dense_layers", [0, 1], ["dense_layers=[0, 1]", "whole number", "tuple"]),
        ("dense_layers", True, ["dense_layers=True", "whole number"]),
        ("kv", 8, ["kv=8", "the name of a format, or a pair of such, of keys and of values"]),
        ("kv", ("int8", "int4", "int4"), ["kv=('int8', 'int4', 'int4')", "a pair"]),
        ("budget", "2048", ["budget='2048'", "int", "(0, 1]"]),
        ("budget", True, ["budget=True", "int"]),
        ("budget", None, ["budget=None", "int"]),
        ("budget", 0.0, ["budget=0.0", "(0, 1]"]),
        ("budget", 1.5, ["budget=1.5", "(0, 1]", "pass an int"]),
        ("budget", 2048.0, ["budget=2048.0", "pass an int"]),
        ("budget", math.nan, ["budget=nan", "(0, 1]"]),
        ("budget", math.inf, ["budget=inf", "(0, 1]"]),
        ("budget", -0.1, ["budget=-0.1", "(0, 1]"]),
        ("budget", 0, ["budget=0", "48 tokens (3 pages of 16)", "sinks=4", "recent=6", "at least 48"]),
        ("budget", -1, ["budget=-1", "at least 48"]),
        ("budget", {}, ["names no layer"]),
        ("budget", {-1: 512}, ["key -1", "from 0 on", "'rest'"]),
        ("budget", {"others": 512}, ["key 'others'", "'rest'"]),
        ("budget", {True: 512}, ["key True"]),
        ("budget", {5: "512"}, ["budget[5]='512'", "number"]),
        ("budget", {5: {6: 512}}, ["budget[5]=", "number"]),
        ("budget", {5: 40, "rest": 512}, ["budget[5]: budget=40 is below the 48 tokens"]),
        ("budget", {"rest": 1.5}, ["budget['rest']: budget=1.5", "(0, 1]"]),
        ("budget", (512, 1024), ["budget=(512, 1024)", "mapping"]),
        ("budget", 47, ["budget=47", "Raise budget to at least 48"]),
    ],
)
def test_what_is_not_allowed(field: str, value: object, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as raised:
        SparseConfig(**{field: value})
    for part in parts:
        assert part in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"budget": 48},
        {"budget": 96, "recent": 64},
        {"recent": None},
        {"budget": 1.0},
        {"budget": 1e-9},
        {"page_size": 1, "budget": 20, "sinks": 4, "recent": 16},
        {"page_size": 1024, "budget": 3072},
        {"sinks": 0, "recent": 0, "budget": 16},
        {"dense_layers": 0},
        {"dense_layers": ()},
        {"dense_layers": (0, 5)},
        {"max_tokens": 16},
        {"prefill": "sparse", "prefill_mass": 1},
        *({"group_pooling": name} for name in GROUP_POOLINGS),
        *({"backend": name} for name in BACKENDS),
        {"digest": "of my own", "policy": "of my own", "kv": "of my own"},  # resolved when a cache is made
    ],
)
def test_what_is_allowed(settings: dict[str, object]) -> None:
    config = SparseConfig.of(**settings)
    assert {name: getattr(config, name) for name in settings} == settings


def test_of_and_with() -> None:
    base = SparseConfig(budget=1024, sinks=8)
    assert SparseConfig.of() == SparseConfig()
    assert SparseConfig.of(base) == base
    assert SparseConfig.of(base, budget=512) == SparseConfig(budget=512, sinks=8) == base.with_(budget=512)
    assert SparseConfig.of(budget=512) == SparseConfig(budget=512)
    assert base.budget == 1024  # immutable: the copy was changed
    with pytest.raises(dataclasses.FrozenInstanceError):
        base.budget = 1
    with pytest.raises(ConfigError, match="budget=16 is below"):
        base.with_(budget=16)


def test_an_unknown_setting_suggests_the_nearest() -> None:
    for make in (SparseConfig.of, SparseConfig().with_):
        with pytest.raises(UnknownNameError) as raised:
            make(bugdet=512)
        message = str(raised.value)
        assert "setting='bugdet' is not known. Did you mean 'budget' or" in message
        assert all(field.name in message for field in dataclasses.fields(SparseConfig))


@pytest.mark.parametrize("wrong", [{"budget": 512}, 512, "top_k"])
def test_of_wants_a_config(wrong: object) -> None:
    with pytest.raises(ConfigError, match=r"is not a SparseConfig. Pass patch\(model, SparseConfig\(budget=...\)\)"):
        SparseConfig.of(wrong)


def test_is_a_value() -> None:
    config = SparseConfig(dense_layers=(0, 3))
    assert hash(config) == hash(SparseConfig(dense_layers=(0, 3)))
    assert pickle.loads(pickle.dumps(config)) == config


@pytest.mark.parametrize(("tokens", "pages"), [(0, 0), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)])
def test_pages_for(tokens: int, pages: int) -> None:
    assert SparseConfig().pages_for(tokens) == pages


@pytest.mark.parametrize(
    ("budget", "recent"), [(48, 6), (128, 16), (511, 63), (512, 64), (2048, 64), (0.001, 64), (1.0, 64)]
)
def test_recent_tokens_follow_the_budget(budget: int | float, recent: int) -> None:
    """64, and never more than an eighth of it; a number that is given stays."""
    assert SparseConfig(budget=budget).recent_tokens == recent
    assert SparseConfig().with_(budget=budget).recent_tokens == recent
    assert SparseConfig(recent=9).with_(budget=budget).recent_tokens == 9


@given(page_size=st.integers(1, 90), sinks=st.integers(0, 90), budget=st.integers(0, 1000))
def test_the_least_budget_of_an_error_is_the_least(page_size: int, sinks: int, budget: int) -> None:
    """Although more recent tokens are always read at a larger one."""
    sizes = {"page_size": page_size, "sinks": sinks}
    try:
        SparseConfig(budget=budget, **sizes)
    except ConfigError as error:
        least = int(re.search(r"at least (\d+)", str(error))[1])
        assert least > budget
        SparseConfig(budget=least, **sizes)
        with pytest.raises(ConfigError):
            SparseConfig(budget=least - 1, **sizes)


def test_a_budget_too_small_for_the_recent_tokens_that_were_asked_for() -> None:
    with pytest.raises(
        ConfigError, match=r"budget=95 is below the 96 tokens \(6 pages of 16\) that sinks=4, recent=64"
    ):
        SparseConfig(budget=95, recent=64)


@given(page_size=st.integers(1, 40), sinks=st.integers(0, 90), recent=st.integers(0, 90), length=st.integers(1, 400))
def test_forced_pages_are_enough_and_no_more(page_size: int, sinks: int, recent: int, length: int) -> None:
    """An upper bound for every length, and reached by some: the budget's floor is neither unsafe nor wasteful."""
    config = SparseConfig(page_size=page_size, sinks=sinks, recent=recent, budget=1.0)

    def forced(n: int) -> int:
        return len({i // page_size for i in range(n) if i < sinks or i >= n - max(recent, 1)})

    assert forced(length) <= config.forced_pages
    far = sinks + recent + 2 * page_size  # long enough that sinks and window do not meet
    assert max(forced(n) for n in range(far, far + page_size)) == config.forced_pages


@pytest.mark.parametrize(("budget", "pages"), [(96, 6), (111, 6), (112, 7), (2048, 128)])
def test_a_budget_in_tokens_is_rounded_down(budget: int, pages: int) -> None:
    config = SparseConfig(budget=budget)
    assert not config.is_fraction
    assert {config.budget_pages(n) for n in (0, 1, 10**6)} == {pages}


@given(budget=st.floats(1e-3, 1.0), tokens=st.integers(0, 10**6), page_size=st.sampled_from([1, 16, 64]))
def test_a_fraction_is_rounded_up(budget: float, tokens: int, page_size: int) -> None:
    config = SparseConfig(budget=budget, page_size=page_size)
    assert config.is_fraction
    pages = config.budget_pages(tokens)
    assert pages >= config.forced_pages
    assert pages * page_size >= budget * tokens * (1 - 1e-12)
    assert pages == config.forced_pages or (pages - 1) * page_size < budget * tokens


def test_the_whole_context_as_a_fraction() -> None:
    config = SparseConfig(budget=1.0)
    assert all(config.budget_pages(n) >= config.pages_for(n) for n in range(500))


@given(
    budget=st.floats(1e-3, 1.0) | st.integers(20, 900),
    page_size=st.sampled_from([1, 3, 16]),
    num_pages=st.integers(1, 60),
)
def test_a_table_is_covered_if_no_sequence_in_it_is_cut(budget: int | float, page_size: int, num_pages: int) -> None:
    """For a number of tokens also the other way round."""
    least = SparseConfig(budget=1.0, page_size=page_size, sinks=1, recent=2).forced_pages * page_size
    budget = max(budget, least) if isinstance(budget, int) else budget
    config = SparseConfig(budget=budget, page_size=page_size, sinks=1, recent=2)
    lengths = range(1, num_pages * config.page_size + 1)
    all_whole = all(config.budget_pages(n) >= config.pages_for(n) for n in lengths)
    assert all_whole or not config.covers(num_pages)
    assert config.is_fraction or config.covers(num_pages) == all_whole


@pytest.mark.parametrize(
    ("budget", "page_size", "covered"),
    [(4096, 16, 128), (2048, 16, 128), (1024, 16, 64), (4096, 24, 85), (4096, 1024, 2), (1.0, 16, 128), (0.1, 16, 6)],
)
def test_with_a_least_share_no_more_is_covered_than_is_read_whole(
    budget: int | float, page_size: int, covered: int
) -> None:
    config = SparseConfig(budget=budget, page_size=page_size, sinks=1, group_pooling="share", min_share=0.01)
    assert config.covers(covered)
    assert not config.covers(covered + 1)
    assert not config.reads_all


@pytest.mark.parametrize(
    ("dense_layers", "dense"), [(0, set()), (2, {1, 3}), (99, {1, 3, 4}), ((), set()), ((0, 4), {4})]
)
def test_dense_layers(dense_layers: int | tuple[int, ...], dense: set[int]) -> None:
    """A number counts the layers that can be sparse, a tuple names indices."""
    assert SparseConfig(dense_layers=dense_layers).dense_among([1, 3, 4]) == dense


def test_budgets_by_layer_are_a_value() -> None:
    """However they are given: hashed, compared, pickled, and changed like any other."""
    config = SparseConfig(budget={"rest": 0.1, 5: 2048, 2: 512}, sinks=8)
    assert config.budget == ((2, 512), (5, 2048), ("rest", 0.1))
    for same in (config.with_(), SparseConfig(budget={"5": 2048, "2": 512, "rest": 0.1}, sinks=8)):
        assert (same, hash(same)) == (config, hash(config))
    assert pickle.loads(pickle.dumps(config)) == config
    assert config.with_(budget=256) == SparseConfig(budget=256, sinks=8)
    assert config.with_(budget={5: 2048, "rest": 0.1}) != config


def test_a_layer_has_its_own_budget_and_what_follows_from_it() -> None:
    config = SparseConfig(budget={2: 128, 5: 2048, "rest": 0.1})
    assert [config.at(i) for i in (2, 5, 0, 9)] == [SparseConfig(budget=x) for x in (128, 2048, 0.1, 0.1)]
    assert [config.at(i).recent_tokens for i in (2, 5)] == [16, 64]
    assert config.each == [config.at(2), config.at(5), config.at(0)]
    assert SparseConfig().at(7) == SparseConfig() == SparseConfig().each[0]
    assert SparseConfig(budget={2: 128}).at(1).reads_all  # nothing is chosen where nobody has said of how much
    for ask in (lambda: config.budget_pages(100), lambda: config.is_fraction, lambda: config.recent_tokens):
        with pytest.raises(ConfigError, match=r"differs by layer: ask config.at\(layer_idx\)"):
            ask()


def test_a_function_is_asked_once_for_every_layer_of_a_model() -> None:
    asked = []

    def budget(layer_idx: int) -> int | float:
        asked.append(layer_idx)
        return 1.0 if layer_idx == 3 else 512

    config = SparseConfig(budget=budget)
    with pytest.raises(ConfigError, match="asked when a patch or a cache is made"):
        config.at(3)
    settled = config.for_layers([1, 3, 4], 6)
    assert settled == SparseConfig(budget={1: 512, 3: 1.0, 4: 512})
    assert settled.for_layers([1, 3, 4], 6) is settled
    assert asked == [1, 3, 4]


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({9: 512, "rest": 64}, "names 9, and of the model's layers 0 to 5 only 0, 2-4 can be sparse"),
        ({1: 512, 5: 512, "rest": 64}, "names 1, 5, and of the model's"),
        ({0: 512, 3: 512}, "budget has none for 2, 4: name all that can be sparse, or add 'rest'"),
    ],
)
def test_budgets_for_other_layers_than_a_model_has(budget: dict[int | str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SparseConfig(budget=budget).for_layers([0, 2, 3, 4], 6)


def test_what_is_named_for_layers_that_are_gone_is_left_out() -> None:
    config = SparseConfig(budget={0: 64, 3: 128, "rest": 256}, dense_layers=(1, 4))
    assert config.up_to(5) is config
    assert config.up_to(3) == SparseConfig(budget={0: 64, "rest": 256}, dense_layers=(1,))


def test_a_budget_of_all_is_a_dense_layer() -> None:
    config = SparseConfig(dense_layers=1, budget={3: 1.0, 4: 0.5, "rest": 128})
    assert config.dense_among([1, 2, 3, 4]) == {1, 3}
    assert SparseConfig(dense_layers=0, budget=1.0).dense_among([1, 2]) == {1, 2}


# -- files


BUDGETS = st.integers(48, 10**7) | st.floats(1e-9, 1.0)
SETTINGS = st.fixed_dictionaries(
    {},
    optional={
        "budget": BUDGETS | st.dictionaries(st.integers(0, 99) | st.just("rest"), BUDGETS, min_size=1),
        "dense_layers": st.integers(0, 9) | st.lists(st.integers(0, 99)).map(tuple),
        "digest": st.text(),
        "recent": st.none() | st.just(0),
        "capture": st.booleans(),
        "max_tokens": st.none() | st.integers(16),
    },
)


@given(settings=SETTINGS)
def test_what_is_saved_is_loaded(settings: dict[str, object], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "settings.json"
    config = SparseConfig(**settings)
    config.save(path)
    loaded = SparseConfig.load(path)
    assert loaded == config
    assert repr(loaded) == repr(config)  # 1 is not 1.0
    assert not list(path.parent.glob("*.partial"))


def test_a_file_says_everything_and_may_say_less(tmp_path: Path) -> None:
    """It keeps its meaning when defaults change; one that is written by hand need not."""
    path = tmp_path / "settings.json"
    SparseConfig(budget={5: 2048, "rest": 512}).save(path)
    content = json.loads(path.read_text())
    assert content.pop("sparsekv_settings") == 1
    assert content["budget"] == {"5": 2048, "rest": 512}
    assert list(content) == [field.name for field in dataclasses.fields(SparseConfig)]
    path.write_text('{"sinks": 8, "dense_layers": [0, 3], "kv": ["int8", "int4"]}')
    assert SparseConfig.load(path) == SparseConfig(sinks=8, dense_layers=(0, 3), kv="int8-int4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is damaged, or no settings file"),
        ("\xff", "is damaged, or no settings file"),
        ("[1]", "must hold names and values"),
        ('{"sparsekv_settings": 2}', "has revision 2 of the settings, and this version of sparsekv reads 1"),
        ('{"bugdet": 512}', "setting='bugdet' is not known. Did you mean 'budget'"),
        ('{"budget": "512"}', "budget='512' must be a number"),
        ('{"budget": NaN}', r"budget=nan: a float is a fraction"),
        ('{"budget": {"5": 3}}', r"budget\[5\]: budget=3 is below"),
        ('{"group_pooling": "mean"}', "group_pooling='mean' is not known"),
        ('{"digest": ["minmax"]}', r"digest=\['minmax'\] must be a name"),
    ],
)
def test_a_file_that_is_no_good_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match=rf"settings\.json.*{message}") as raised:
        SparseConfig.load(path)
    assert not isinstance(raised.value, UnknownNameError)  # the command line was right


def test_what_cannot_be_saved_or_loaded_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    with pytest.raises(ConfigError, match=r"settings\.json cannot be read: No such file"):
        SparseConfig.load(path)
    SparseConfig(sinks=8).save(path)
    with pytest.raises(ConfigError, match="budget is a function"):
        SparseConfig(budget=lambda layer_idx: 512).save(path)
    assert SparseConfig.load(path) == SparseConfig(sinks=8)


def test_numpy_numbers_are_told_what_is_wanted() -> None:
    """They are not silently kept: a config is a plain value that prints and saves as one."""
    with pytest.raises(ConfigError, match="page_size="):
        SparseConfig(page_size=np.int64(16))
