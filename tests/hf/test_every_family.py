"""Every type of transformers that generates text, very small: what is told of it is so, and stands in the table."""

from __future__ import annotations

import contextlib
import json
import warnings

import pytest
import torch
import transformers
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsekv
from sparsekv import UnsupportedModelError
from sparsekv.cache import layer_kinds, own_layers
from sparsekv.commands.models import TYPES
from sparsekv.hf.support import CACHE
from tools import reach
from tools.tiny_models import smallest

TABLE = reach.path_of(transformers.__version__)
needs_table = pytest.mark.skipif(not TABLE.exists(), reason=f"no {TABLE.name}: python -m tools.reach makes it")


@pytest.fixture(scope="module")
def rows() -> dict[str, reach.Row]:
    """The committed table of this transformers."""
    return {row["type"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))["rows"]}


@pytest.fixture(scope="module")
def models() -> dict[str, PreTrainedModel]:
    """All causal types of which there is a tiny model."""
    found = {}
    for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        with contextlib.suppress(ValueError):
            found[family] = smallest(family)
    return found


@torch.no_grad()
def left_dense_at_first_use(model: PreTrainedModel) -> set[int]:
    """The layers that the patch says it serves, and that a prompt and a token show not to be served."""
    patch = sparsekv.patch(model, budget=4096, page_size=4, dense_layers=0)
    before = {status.layer_idx for status in patch.layers if status.kind is not None}
    cache = patch.new_cache()
    for ids in ([[5, 6, 7]], [[8]]):
        model(torch.tensor(ids), use_cache=True, **{CACHE: cache})
    patch.undo()
    return before - {status.layer_idx for status in patch.layers if status.kind is not None}


@pytest.mark.wide
def test_the_layers_that_never_turn_sparse_are_those_that_the_report_knows(models, monkeypatch) -> None:
    """A layer that turns dense at its first use must be known before (`sparsekv.cache.layer_kinds`), and the others
    must not. mllama's cross-attention has no first use without an image."""
    known = {family: set(own_layers(model.config)) for family, model in models.items() if family != "mllama"}
    monkeypatch.setattr(layer_kinds, "_reason_for_all", lambda text: None)
    found = {}
    for family in known:
        with contextlib.suppress(UnsupportedModelError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found[family] = left_dense_at_first_use(models[family])
    assert len(found) > 80
    assert {family: known[family] for family in found} == found


@needs_table
def test_the_table_has_every_type_and_none_is_wrong(rows) -> None:
    """A new type of transformers: `python -m tools.reach --only TYPE` adds it."""
    assert list(rows) == TYPES
    assert [name for name, row in rows.items() if not reach.is_right(row)] == []
    assert reach.markdown(json.loads(TABLE.read_text())) == TABLE.with_suffix(".md").read_text(encoding="utf-8")


@needs_table
@pytest.mark.wide
def test_the_table_says_what_is_told_today(rows, models) -> None:
    """What has changed since is swept again: `python -m tools.reach`."""
    of_causal = {family: rows[family] for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES}
    assert {family for family, row in of_causal.items() if "not_run" not in row} == set(models)
    told = {family: sparsekv.supports(model, **reach.SETTINGS).as_dict() for family, model in models.items()}
    plain = json.loads(json.dumps(told))
    assert {family: {key: rows[family][key] for key in plain[family]} for family in plain} == plain


@pytest.mark.wide
@pytest.mark.timeout(3600)
@pytest.mark.skipif(TABLE.exists(), reason="the sweep of this transformers is committed")
def test_a_transformers_without_a_table_is_swept() -> None:
    wrong = {name: row for name in TYPES if not reach.is_right(row := reach.row_apart(name))}
    assert not wrong


def test_what_decodes_otherwise_is_noticed(tiny, monkeypatch) -> None:
    model = tiny("llama")
    mode = reach.MODES["padded"]
    assert reach._compared(mode, model) == reach.EQUAL
    monkeypatch.setitem(reach.SETTINGS, "budget", 8)
    assert reach._compared(mode, model).startswith("other ")


def test_a_type_that_ends_its_process_is_a_row(monkeypatch) -> None:
    monkeypatch.setattr(reach, "row_of", lambda name: exit(3))
    row = reach.row_apart("llama")
    assert (row["verdict"], row["not_run"]) == ("crashes", "exit code 3")
    assert not reach.is_right(row)
