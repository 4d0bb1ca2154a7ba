"""Settings that a model cannot have are refused when its cache is made, before anything is stored."""

from __future__ import annotations

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, LlamaForCausalLM, LlavaConfig, MambaConfig, PretrainedConfig

import sparsekv
from sparsekv.cache import PagedCache, heads_of
from sparsekv.cache.model_check import Heads
from sparsekv.errors import ConfigError, UnknownNameError
from sparsekv.policies.all_pages import AllPages
from sparsekv.testing.cache_pair import tiny_config


@pytest.mark.parametrize(("dense_layers", "missing"), [((40,), "40"), ((0, 4, 3, 9), "4, 9")])
def test_dense_layers_that_do_not_exist(dense_layers: tuple[int, ...], missing: str) -> None:
    with pytest.raises(ConfigError, match=rf"names {missing}, and the model has layers 0 to 3\. Name some of these"):
        PagedCache(tiny_config(num_layers=4), dense_layers=dense_layers)


@pytest.mark.parametrize("dense_layers", [0, 4, 99, (), (3,), (0, 1, 2, 3)])
def test_dense_layers_that_exist(dense_layers: int | tuple[int, ...]) -> None:
    PagedCache(tiny_config(num_layers=4), dense_layers=dense_layers)


def test_dense_layers_are_counted_among_those_that_can_be_sparse() -> None:
    """Those that are transformers' own, as first layers with a window often are, do not count."""
    config = tiny_config(num_layers=5)
    config.layer_types = ["sliding_attention", "full_attention", "sliding_attention", *["full_attention"] * 2]
    config.sliding_window = 8
    cache = PagedCache(config, dense_layers=2)
    forks = cache.fork(dense_layers=1), cache.fork(dense_layers=(0, 4))
    for each, dense in zip((cache, *forks), ({1, 3}, {1}, {4}), strict=True):
        assert each.dense_layers == dense
        assert {layer.layer_idx for layer in each.paged_layers if isinstance(layer.policy, AllPages)} == dense


@pytest.mark.parametrize(
    ("config", "heads"),
    [
        (LlamaConfig(hidden_size=512, num_attention_heads=8, num_key_value_heads=2), Heads(8, 2, 64)),
        (LlavaConfig(text_config=LlamaConfig(num_attention_heads=8, head_dim=16)), Heads(8, 8, 16)),
        (PretrainedConfig(hidden_size=512, num_attention_heads=[8, 4]), None),
        (MambaConfig(), None),
        (DeepseekV3Config(), Heads(128, 1, 512 + 64, num_halves=1)),
    ],
    ids=["grouped", "the text part", "layers that differ", "no attention", "latents"],
)
def test_the_heads_of_a_config(config: PretrainedConfig, heads: Heads | None) -> None:
    assert heads_of(config) == heads


def test_a_digest_that_cannot_be_kept_of_such_heads(of_eights: str) -> None:
    with pytest.raises(ConfigError, match="head_dim=12 must divide by 8"):
        PagedCache(tiny_config(d=12), digest=of_eights, dense_layers=1)


@pytest.mark.parametrize("settings", [{"policy": "recent"}, {"dense_layers": 2}, {"digest": "minmax"}])
def test_a_digest_that_nobody_keeps_may_be_any(settings: dict[str, object], of_eights: str) -> None:
    PagedCache(tiny_config(num_layers=2, d=12), **{"digest": of_eights, "dense_layers": 0, **settings})


def test_a_fork_is_checked_too(of_eights: str) -> None:
    cache = PagedCache(tiny_config(d=12), digest=of_eights, policy="recent", dense_layers=0)
    with pytest.raises(ConfigError, match="head_dim=12"):
        cache.fork(policy="top_k")
    with pytest.raises(ConfigError, match="layers 0 to 1"):
        cache.fork(dense_layers=(2,))
    with pytest.raises(UnknownNameError, match="policy='topk'"):
        cache.fork(policy="topk")


@pytest.mark.parametrize("name", [["minmax"], {"minmax": 1}, None, 3])
@pytest.mark.parametrize("field", ["digest", "policy"])
def test_what_is_no_name_is_an_unknown_one(field: str, name: object) -> None:
    with pytest.raises(UnknownNameError, match=f"{field}="):
        PagedCache(tiny_config(), **{field: name})


@pytest.mark.parametrize("settings", [{"digest": "of_eights"}, {"dense_layers": (7,)}])
@pytest.mark.usefixtures("of_eights")
def test_patch_refuses_them_too(settings: dict[str, object]) -> None:
    model = LlamaForCausalLM(tiny_config(d=12)).eval()
    with pytest.raises(ConfigError, match=r"head_dim=12|names 7"):
        sparsekv.patch(model, **{"dense_layers": 1, **settings})
    with sparsekv.patch(model):
        assert model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2).shape == (1, 5)
