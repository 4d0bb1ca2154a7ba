"""A page format with a kernel of its own: one `.py`, one `.cuh`, and nothing in the package that names it."""

import runpy
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekv
from sparsekv import ConfigError, UnknownNameError, ops
from sparsekv.ops import compiler, instances, reference, why_reference
from sparsekv.ops.formulas import kernel_of, with_kernels
from sparsekv.pages.formats import FORMATS, KEYS, PageFormat, Plain
from sparsekv.testing.pages import NAN, empty_summary, fitted_state, random_pages, stored_as

E5M2 = runpy.run_path(str(Path(__file__).with_name("e5m2_pages.py")))["E5M2"]
OPS: Any = torch.ops.sparsekv

needs_nvrtc = pytest.mark.skipif(
    compiler._no_compiler() is not None, reason="needs the cuda extra: pip install '.[cuda]'"
)


class Rounded(Plain):
    """Plain pages that hold what E5M2 leaves of keys and values: what its steps must be like."""

    kernel = None
    of: type[PageFormat] = E5M2

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        kind = self.of()
        return kind.decode(kind.encode(states, valid, which), states.shape[-1], states.dtype, which)


class Recoded(Rounded):
    """The same of a format that ships."""

    of = FORMATS.get("int4")


class Scaled(PageFormat):
    """8 bits and, for each channel of a page, a power of two: a page is encoded as a whole."""

    def record(self, page_size: int, head_dim: int, dtype: torch.dtype, which: int) -> tuple[int, torch.dtype]:
        if head_dim * 4 % page_size:
            raise ConfigError(f"a page of {page_size} tokens cannot share out {head_dim} scales.")
        return head_dim + head_dim * 4 // page_size, torch.uint8

    def encode(self, states: Tensor, valid: Tensor | None, which: int) -> Tensor:
        known = states if valid is None else states.masked_fill(~valid[:, None, :, None], 0.0)
        scale = torch.exp2((known.float().abs().amax(2) / 127).clamp_min(1e-20).log2().ceil())  # [m, hkv, d]
        codes = (known.float() / scale[:, :, None]).round().to(torch.int8).flatten(2)
        return torch.cat([codes.view(torch.uint8), scale.view(torch.uint8)], -1).unflatten(2, (states.shape[2], -1))

    def decode(self, records: Tensor, head_dim: int, dtype: torch.dtype, which: int) -> Tensor:
        page_size = records.shape[-2]
        codes, scale = records.flatten(-2).split([page_size * head_dim, head_dim * 4], -1)
        tokens = codes.contiguous().view(torch.int8).unflatten(-1, (page_size, head_dim))
        return (tokens * scale.contiguous().view(torch.float32)[..., None, :]).to(dtype)


@pytest.fixture(autouse=True)
def _registered() -> Iterator[None]:
    own = {"e5m2": E5M2, "rounded": Rounded, "recoded": Recoded, "scaled": Scaled}
    for name, kind in own.items():
        FORMATS.register(name)(kind)
    yield
    for name in own:
        FORMATS.remove(name)


def generated(kv: str, **options: Any) -> tuple[Tensor, sparsekv.PagedCache]:
    """What a tiny model writes after a prompt with padding, and its cache."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.5)).eval()
    tokens, mask = torch.randint(1, 50, (2, 60)), torch.ones(2, 60, dtype=torch.int64)
    mask[0, :7] = 0
    settings = {"budget": 24, "page_size": 4, "recent": 4, "dense_layers": 0, "kv": kv}
    with sparsekv.patch(model, **settings):
        out = model.generate(
            tokens, attention_mask=mask, max_new_tokens=12, do_sample=False, return_dict_in_generate=True,
            output_logits=True, pad_token_id=0, **options,
        )  # fmt: skip
    return torch.stack(out.logits), out.past_key_values


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize(("kv", "held"), [("e5m2", "rounded"), ("int4", "recoded")])
def test_a_model_generates_as_if_its_pages_held_rounded_keys_and_values(
    kv: str, held: str, options: dict[str, Any]
) -> None:
    logits, cache = generated(kv, **options)
    expected, plain = generated(held, **options)
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, generated("plain", **options)[0])
    assert cache.stats.sparse_steps == plain.stats.sparse_steps > 0
    pages, wide = cache._store.layers[0], plain._store.layers[0]
    assert pages.page_nbytes == 4 * {"e5m2": 8 + 8, "int4": 22 + 6}[kv]
    assert wide.page_nbytes == 2 * 4 * 8 * 4  # float32
    assert cache.nbytes < plain.nbytes
    plain_cache = cache.to_dynamic()
    assert torch.equal(plain_cache.layers[1].values, cache.layers[1].values)
    for layer, other in zip(cache.layers, plain.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_cropped_and_forked_caches_keep_the_format() -> None:
    _, cache = generated("scaled")
    before = cache.layers[0].keys
    cache.crop(-3)
    fork = cache.fork(policy="oracle")
    torch.testing.assert_close(fork.layers[0].keys, before[:, :, :-3], rtol=0, atol=0.05)
    with pytest.raises(ConfigError, match="kv must stay 'scaled'"):
        cache.fork(kv="plain")


def test_a_format_that_is_not_there_and_one_that_does_not_fit_are_errors() -> None:
    config = LlamaConfig(num_hidden_layers=2, head_dim=10, num_attention_heads=2, hidden_size=20)
    with pytest.raises(UnknownNameError, match=r"kv='e5m3' .*Did you mean 'e5m2'"):
        sparsekv.PagedCache(config, kv="e5m3")
    with pytest.raises(ConfigError, match="16 tokens cannot share out 10 scales"):
        sparsekv.PagedCache(config, kv="scaled")


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", ["e5m2", "scaled"])
def test_ops_read_and_write_pages_in_their_format(name: str, padded: bool) -> None:
    """The tokens come where they belong, beside those that were there; digests sum up what pages hold; attention is
    that to the decoded pages."""
    kind, where = FORMATS.get(name)(), {"head_dim": 8, "page_size": 8}
    after = random_pages([21, 16, 5], **where)
    lens, t = after.seq_lens, 6
    valid = torch.arange(t) >= torch.tensor([[1], [4], [2]]) if padded else None
    new = torch.full((3,), t) if valid is None else valid.sum(1)
    before = replace(after, seq_lens=(lens - new).clamp_min(0))
    columns = torch.arange(t).expand(3, -1) if valid is None else valid.cumsum(1) - 1
    position = ((lens - new)[:, None] + columns).clamp_min(0)
    new_tokens = after.kv_pool[after.block_table.gather(1, position // 8).long(), :, :, position % 8]
    key, value = new_tokens.permute(2, 0, 3, 1, 4)  # [2, b, hkv, t, d]
    if not padded:
        key, value, before = key[:2], value[:2], replace(before, seq_lens=before.seq_lens[:2])
        after = replace(after, block_table=after.block_table[:2], seq_lens=lens[:2])
        before = replace(before, block_table=after.block_table)
    pool, expected = stored_as(kind, before), stored_as(kind, after)
    summary = [torch.full((len(pool), 2, 2, 8), NAN)]
    OPS.append_kv(key, value, valid, after.block_table, after.seq_lens, pool, summary, [], "minmax", name)
    query = torch.randn(len(key), 4, 8)
    decoded = kind.decode(expected, 8, torch.float32, KEYS)
    for row, slot, count in after.used():
        page = int(after.block_table[row, slot])
        mine = kind.decode(pool[page], 8, torch.float32, KEYS)[:, :, :count]
        torch.testing.assert_close(mine, decoded[page, :, :, :count], rtol=0, atol=0 if name == "e5m2" else 0.05)
        if (slot + 1) * 8 > int(before.seq_lens[row]):
            assert torch.equal(summary[0][page], torch.stack([mine[0].amin(1), mine[0].amax(1)], 1))
    slots = torch.tensor([[[0, -1], [0, 1]], [[1, -1], [0, -1]], [[0, -1], [0, -1]]], dtype=torch.int32)[: len(key)]
    attended = OPS.attend_pages(query, expected, after.block_table, after.seq_lens, slots, 0.3, 0.0, None, name)
    plain = OPS.attend_pages(query, decoded, after.block_table, after.seq_lens, slots, 0.3)
    torch.testing.assert_close(attended, plain)


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_its_kernels_compile(arch: str) -> None:
    minmax, sketch = kernel_of("minmax"), kernel_of("sign_sketch")
    assert minmax is not None
    assert sketch is not None
    for spec in (
        instances.append_kv(torch.float16, 96, sketch, E5M2),
        instances.attend_pages(torch.bfloat16, 96, 16, E5M2),
        instances.sparse_decode(torch.bfloat16, 128, 4, minmax, E5M2),
    ):
        assert compiler.compile_cubin(spec, arch).code


@needs_nvrtc
def test_records_of_another_size_do_not_compile() -> None:
    class Wrong(E5M2):
        def record(self, page_size: int, head_dim: int, dtype: torch.dtype, which: int) -> tuple[int, torch.dtype]:
            return head_dim + 1, torch.uint8

    with pytest.raises(sparsekv.errors.KernelCompileError, match=r"key_record<64>\(4\) == 65"):
        compiler.compile_cubin(instances.attend_pages(torch.bfloat16, 64, 4, Wrong), "sm_90")


def test_a_format_without_a_kernel_says_that_plain_torch_serves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "unavailable", lambda device=None: None)
    on = (torch.device("cuda", 0), torch.bfloat16, (128, 4), 16, "minmax")
    assert why_reference(*on, "e5m2") is None
    assert "'scaled' are written and read in plain torch (kernels: 'e5m2', 'int4', " in str(
        why_reference(*on, "scaled")
    )


@pytest.mark.gpu
@pytest.mark.parametrize("page_size", [16, 64])
@pytest.mark.parametrize("digest", with_kernels())
@pytest.mark.parametrize("head_dim", instances.HEAD_DIMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_on_a_gpu_its_kernels_do_what_its_class_says(
    dtype: torch.dtype, head_dim: int, digest: str, page_size: int
) -> None:
    device, formula, t = torch.device("cuda", 0), sparsekv.DIGESTS.get(digest)(), 701
    pages = random_pages([t - 1, page_size, 37], 2, head_dim, page_size, dtype, device=device)
    where = (pages.block_table, pages.seq_lens)
    state, scaling = fitted_state(formula, pages), head_dim**-0.5
    query = torch.randn(3, 8, head_dim, device=device).to(dtype)
    key, value = torch.randn(2, 3, 2, t, head_dim, device=device).to(dtype)
    valid = torch.arange(t, device=device) >= t - pages.seq_lens[:, None]
    pools, summaries = [], []
    for op in (OPS.append_kv, reference.append_kv):
        pools.append(torch.zeros_like(stored_as(E5M2(), pages)))
        summaries.append([x.nan_to_num(0).zero_() for x in empty_summary(formula, pages)])
        op(key, value, valid, *where, pools[-1], summaries[-1], state, digest, "e5m2")
    assert torch.equal(*pools)
    full = pages.block_table[0, : (t - 1) // page_size].long()
    why = formula.why_unlike(*([field[full] for field in summary] for summary in summaries), page_size, head_dim)
    assert why is None, why

    some = torch.tensor([[[0, -1]] * 2] * 3, dtype=torch.int32, device=device)
    for slots in (None, some):
        attended = (query, pools[0], *where, slots, scaling, 0.0, None, "e5m2")
        alike(OPS.attend_pages(*attended), reference.attend_pages(*attended))

    new = (query, key[:, :, :1], value[:, :, :1], *where)
    step = (summaries[1], state, None, digest, "max", 8, 4, 16, scaling, 0.0, None, "e5m2")
    out, lse, slots = OPS.sparse_decode(*new, pools[0], *step)
    _, _, expected = ops.for_backend("reference").sparse_decode(*new, pools[1], *step)
    assert torch.equal(*pools)
    assert torch.equal(slots >= 0, expected >= 0)
    alike((out, lse), reference.attend_pages(query, pools[1], *where, slots, scaling, 0.0, None, "e5m2"))


def alike(got: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for mine, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(mine.float(), theirs.float(), rtol=2e-2, atol=1e-2)
