"""Model code that asks which attention it runs with gets its own answer; the interfaces find our functions."""

from __future__ import annotations

import ast
import pickle
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AttentionInterface, AttentionMaskInterface, modeling_flash_attention_utils
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, flash_attention_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils.generic import is_flash_attention_requested

import sparsekv
from sparsekv.hf.attention import AttentionName, sparsekv_attention, sparsekv_mask

FULL = {"budget": 4096, "page_size": 4, "dense_layers": 0}

# How model code may ask for the name of its attention, and where. "looks up" and "asks" are read out of the sources;
# a place that is in no line below needs a look at what it does for a patched model, and then a line.
VERDICTS = {
    # Both branches reach the attention interface, with the queries that are asked for.
    "asks: slices the queries of layers that share keys": "gemma4 gemma4_unified",
    # Such a layer's cache is no DynamicLayer: it stays transformers' own.
    "asks: adds the tokens that its indexer has chosen to the mask": "axk2 deepseek_v32 dots3_note glm5_next "
    "glm_moe_dsa hy_v4 hy_v4_vl minimax_m3_vl mistral_large4",
    # gpt2 with reorder_and_upcast_attn, eager: the layer's tags never arrive, and it stays dense.
    "asks: may pass the attention interface by": "decision_transformer gpt2",
    "asks: is refused, as it has no attention interface": "falcon",
    "asks: a tower or another part that is not patched": "kosmos2_5 qwen2_5_omni timm_backbone timm_wrapper",
    "asks: before the model is there": "hrm_text",
    # By hash, so a plain string is needed, and there is one: no patch is there before the model is.
    "looks up: a class, when the model is made": "bark data2vec deepseek_ocr2 falcon git gpt_neo gptj sam sam_hq "
    "superglue unlimited_ocr",
    # Where the implementation is set and checked; continuous batching, which sets its own and ours again.
    "asks: when it is set": "configuration_utils.py continuous_api.py flash_paged.py hub_kernels.py "
    "initialization.py modeling_utils.py",
    "looks up: when it is set": "modeling_utils.py",
    # By the plain string first: see `attention._dense`.
    "looks up: where a flash attention is loaded from": "modeling_flash_attention_utils.py",
    "asks: equality, or part of the text": "generic.py modeling_flash_attention_utils.py trainer.py utils.py",
    "asks: the name of a kernel from the hub, which is refused": "msa_attention.py",
}
HELPERS = ("get_interface", "is_flash_attention_requested", "lazy_import_flash_attention", "isinstance")
SHARED = ("*.py", "generation/**/*.py", "integrations/*.py", "utils/generic.py", "models/**/modeling_*.py")
NAMED = re.compile("(att(entio)?n_|^)impl")
PLAIN = re.compile(r"get_interface\(\s*self\.config\._attn_implementation,\s*\w+\s*\)")


def ways_to_ask(source: str) -> Iterator[tuple[str, int]]:
    """Every use of a name that is not one that is right whatever the name is, as ("asks" or "looks up", line)."""
    tree = ast.parse(source)
    parents = {child: parent for parent in ast.walk(tree) for child in ast.iter_child_nodes(parent)}
    for node in ast.walk(tree):
        name = node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
        if not NAMED.search(name) or isinstance(node.ctx, ast.Store):
            continue
        way = way_of(node, parents[node])
        if way is not None:
            yield way, node.lineno


def way_of(node: ast.AST, parent: ast.AST) -> str | None:
    if isinstance(parent, ast.Subscript):
        return None if "ATTENTION_FUNCTIONS" in ast.unparse(parent.value) else "looks up"
    if isinstance(parent, ast.Compare):
        if isinstance(parent.ops[0], (ast.Is, ast.IsNot)) or "ATTENTION_FUNCTIONS" in ast.unparse(parent):
            return None
        return "looks up" if isinstance(parent.comparators[0], (ast.Set, ast.Dict)) else "asks"
    if isinstance(parent, ast.Call):
        called = getattr(parent.func, "attr", getattr(parent.func, "id", ""))
        is_method = parent.func is node or (isinstance(node, ast.Attribute) and "set_attn" in node.attr)
        return None if is_method or called in HELPERS else "looks up" if called == "get" else "asks"
    handed_on = (ast.Assign, ast.AnnAssign, ast.FormattedValue, ast.IfExp, ast.Return, ast.keyword)
    return None if isinstance(parent, handed_on) else "asks"


def test_every_place_of_transformers_that_asks_for_the_name_has_a_verdict() -> None:
    known = {(text.split(":")[0], place) for text, places in VERDICTS.items() for place in places.split()}
    root, new = Path(transformers.__file__).parent, []
    for path in (path for pattern in SHARED for path in root.glob(pattern)):
        source = path.read_text(encoding="utf-8")
        if "n_impl" not in PLAIN.sub("", source):
            continue
        place = path.parent.name if path.parent.parent == root / "models" else path.name
        lines = source.splitlines()
        new += [
            f"{path.relative_to(root)}:{line}: ({way}) {lines[line - 1].strip()}"
            for way, line in ways_to_ask(source)
            if (way, place) not in known
        ]
    assert not new, (
        "Code of transformers asks for the name of its attention in new places. Read what it does for a patched "
        "model (the name equals the model's own, but is another key), compare with an unpatched one, and add a line "
        "to VERDICTS:\n" + "\n".join(new)
    )


def test_a_set_or_another_dictionary_would_be_found() -> None:
    source = "if config._attn_implementation in {'sdpa'}: pass\nx = CLASSES[self._attn_implementation]"
    assert list(ways_to_ask(source)) == [("looks up", 1), ("looks up", 2)]


@pytest.mark.parametrize("own", ["eager", "sdpa", "flash_attention_2", "kernels-community/flash-attn2"])
def test_the_name_is_the_models_own_and_leads_to_our_functions(own, tiny) -> None:
    model = tiny("llama")
    model.config._attn_implementation_internal = own
    with sparsekv.patch(model):
        name = model.config._attn_implementation
        assert name == own
        assert name in ("eager", "sdpa", own)
        assert f"{name}" == own
        assert is_flash_attention_requested(model.config) == ("flash" in own)
        assert ALL_ATTENTION_FUNCTIONS.get_interface(name, None) is sparsekv_attention
        assert ALL_MASK_ATTENTION_FUNCTIONS[name] is sparsekv_mask
        for functions in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            assert functions.get(own) not in (sparsekv_attention, sparsekv_mask)
        assert "sparsekv" not in model.config.to_json_string()
    assert type(model.config._attn_implementation) is str


def test_what_is_left_behind_does_not_hinder_torch_compile(tiny) -> None:
    """It follows a model into these dictionaries, and may cut its graph, in every layer, at a key of another type."""
    with sparsekv.patch(tiny("llama")):
        keys = {*ALL_ATTENTION_FUNCTIONS.valid_keys(), *ALL_MASK_ATTENTION_FUNCTIONS.valid_keys()}
    assert {type(key) for key in keys} == {str}


def test_a_flash_attention_is_loaded_by_its_plain_name(tiny, prompt, monkeypatch) -> None:
    """As transformers looks up in a dictionary where that comes from, also after another one was loaded."""
    asked = []

    def load(implementation: str, *args, **kwargs):
        asked.append(implementation)
        raise ImportError("a test")

    model = tiny("llama")
    model.config._attn_implementation_internal = "flash_attention_2"
    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", load)
    with sparsekv.patch(model), pytest.raises(ImportError, match="a test"):
        model(**prompt(40))
    assert [type(name) for name in asked] == [str]


def test_a_pickled_name_knows_what_it_knew() -> None:
    copied = pickle.loads(pickle.dumps(AttentionName("eager", is_special=True)))
    assert (copied, copied.original, copied.is_special) == ("eager", "eager", True)


def test_a_config_that_names_none_names_none_again() -> None:
    assert AttentionName(None) == "eager"
    assert AttentionName(None).original is None


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa", "a_flash_attention"])
@pytest.mark.parametrize("lengths", [(40,), (40, 33)], ids=["single", "padded"])
def test_queries_that_model_code_slices(attn_implementation, lengths, tiny, prompt, a_flash_attention) -> None:
    """Gemma 4's layers that share keys compute the last tokens alone, by a rule for each attention."""
    model = tiny("gemma4_text")
    model.config._attn_implementation_internal = attn_implementation
    for count in (0, 1, 2, 5):
        with torch.no_grad():
            theirs = model(**prompt(*lengths), logits_to_keep=count).logits
            with sparsekv.patch(model, **FULL):
                ours = model(**prompt(*lengths), logits_to_keep=count).logits
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_prompt_lookup_with_layers_that_share_keys(attn_implementation, tiny, prompt, decode, assert_same) -> None:
    model, inputs = tiny("gemma4_text", attn_implementation=attn_implementation), prompt(40)
    inputs["input_ids"][:, 20:] = inputs["input_ids"][:, :20].clone()
    theirs = decode(model, inputs, prompt_lookup_num_tokens=4)
    with sparsekv.patch(model, **FULL):
        assert_same(decode(model, inputs, prompt_lookup_num_tokens=4), theirs)


@pytest.mark.skipif("minimax_m3_vl_text" not in CONFIG_MAPPING, reason="transformers has no MiniMax-M3 yet")
@pytest.mark.parametrize("attn_implementation", ["eager", "sdpa"])
def test_a_mask_that_model_code_makes_sparse(attn_implementation, tiny, prompt, decode, assert_same) -> None:
    """MiniMax-M3's indexer chooses blocks, which it puts into the mask of eager and sdpa."""
    blocks = {"index_n_heads": 2, "index_head_dim": 16, "index_block_size": 4, "index_topk_blocks": 3}
    blocks |= {"index_local_blocks": 1, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts |= {"shared_intermediate_size": 32}
    model = tiny("minimax_m3_vl_text", attn_implementation=attn_implementation, **blocks, **experts)
    theirs = decode(model, prompt(40))
    with sparsekv.patch(model, **FULL) as patch:
        assert_same(decode(model, prompt(40)), theirs)
    assert [status.is_sparse for status in patch.layers] == [True, False] * 2


@pytest.fixture
def a_flash_attention() -> Iterator[None]:
    """A stand-in that gets the masks of a flash attention, under such a name, on any device."""
    name = "a_flash_attention"

    def attention(module, query, key, value, attention_mask, sliding_window=None, is_causal=None, **kwargs):
        (b, _, t, _), n = query.shape, key.shape[2]
        behind = torch.arange(n - t, n)[:, None] - torch.arange(n)
        mask = ((behind >= 0) & (behind < (sliding_window or n))).expand(b, 1, t, n)
        if attention_mask is not None:
            mask = (mask & attention_mask[:, None, None, -n:].bool()) | (behind == 0)
        return sdpa_attention_forward(module, query, key, value, mask, is_causal=False, **kwargs)

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, flash_attention_mask)
    yield
    for mapping in (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping):
        del mapping[name]
