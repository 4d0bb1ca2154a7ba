"""`max_tokens`, and other input a cache cannot take: refused before anything is written."""

from __future__ import annotations

import pytest
import torch

import sparsekv
from sparsekv import CacheFullError, CacheStateError


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("by", ["input_ids", "inputs_embeds"])
def test_a_full_cache_refuses_before_anything_is_written(family, by, tiny, prompt, assert_same) -> None:
    """No layer has gone ahead of the others, sliding ones included: a smaller input continues as if nothing was."""
    model, ids = tiny(family), prompt(60)["input_ids"]
    embeds = model.get_input_embeddings()(ids).detach()
    with sparsekv.patch(model, budget=4096, page_size=4, max_tokens=48), torch.no_grad():
        expected, cache = [], None
        for refused in (False, True):
            cache = model(ids[:, :40], use_cache=True).past_key_values
            if refused:
                too_much = {"input_ids": ids[:, 40:]} if by == "input_ids" else {"inputs_embeds": embeds[:, 40:]}
                with pytest.raises(CacheFullError, match=r"max_tokens leaves 2 of 12.*Nothing was written"):
                    model(**too_much, past_key_values=cache)
                assert cache.get_seq_length() == 40
            expected.append(model(ids[:, 40:44], past_key_values=cache).logits)
    assert torch.equal(*expected)


def test_generate_fills_a_cache_to_its_last_token(tiny, prompt, decode, assert_same) -> None:
    """8 tokens need 7 places behind the prompt, and 9 would need 8; then the cache can be cropped and used again."""
    model = tiny("llama")
    theirs = decode(model, prompt(41))
    with sparsekv.patch(model, budget=4096, page_size=4, max_tokens=48) as patch:
        assert_same(decode(model, prompt(41)), theirs)
        cache = patch.new_cache()
        with pytest.raises(CacheFullError, match="Raise max_tokens, shorten the input, crop the cache"):
            decode(model, prompt(41), past_key_values=cache, max_new_tokens=9)
        assert cache.get_seq_length() == 48
        cache.crop(-7)
        again = decode(model, {"input_ids": theirs.sequences[:, :42]}, past_key_values=cache, max_new_tokens=7)
    assert torch.equal(again.sequences, theirs.sequences)


def test_another_batch_size_is_refused_before_anything_is_written(tiny, prompt) -> None:
    """Also in a model whose first layer slides and would have gone ahead."""
    model, ids = tiny("gemma3_text"), prompt(44)["input_ids"]
    with sparsekv.patch(model, budget=4096, page_size=4), torch.no_grad():
        fresh, cache = (model(ids[:, :40], use_cache=True).past_key_values for _ in range(2))
        with pytest.raises(CacheStateError, match="The cache holds 1 sequences, the input has 2"):
            model(ids[:, 40:].expand(2, -1), past_key_values=cache)
        logits = [model(ids[:, 40:], past_key_values=past).logits for past in (fresh, cache)]
    assert torch.equal(*logits)


def test_no_more_is_reserved_than_the_limit_allows(tiny, prompt, decode) -> None:
    """A static cache of 240 tokens under a limit of 64: 16 pages of 4 tokens, 2 kv heads, 16 channels, 4 layers."""
    with sparsekv.patch(tiny("llama"), budget=4096, page_size=4, max_tokens=64, policy="all") as patch:
        cache = patch.new_cache(reserve_tokens=240)
        decode(patch.model, prompt(40), past_key_values=cache)
    assert cache.nbytes == 4 * 16 * 2 * 4 * 2 * 16 * 4


def test_the_limit_counts_all_sequences(tiny, prompt, decode) -> None:
    with sparsekv.patch(tiny("llama"), budget=4096, page_size=4, max_tokens=96) as patch:
        with pytest.raises(CacheFullError):
            decode(patch.model, prompt(40, 40, 40))
        decode(patch.model, prompt(40, 40))


def test_the_limit_does_not_count_padding(tiny, prompt, decode, assert_same) -> None:
    """Rows of 40, 5 and 3 tokens and 7 decoded ones need 12 + 3 + 3 pages of 4, not three times 12."""
    model, inputs = tiny("llama"), prompt(40, 5, 3)
    theirs = decode(model, inputs)
    with sparsekv.patch(model, budget=4096, page_size=4, max_tokens=18 * 4):
        assert_same(decode(model, inputs), theirs)
    with sparsekv.patch(model, budget=4096, page_size=4, max_tokens=17 * 4), pytest.raises(CacheFullError):
        decode(model, inputs)
