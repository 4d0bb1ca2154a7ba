"""Calls that do not go alike in all ranks."""

from __future__ import annotations

from typing import Any

import torch
from models import SIZES, SMALL, case, failure, is_second, shared, tokens, whole
from torch import Tensor
from transformers import DynamicCache, GptOssConfig, LlamaConfig

import sparsekv
from sparsekv.errors import ConfigError, RankError
from sparsekv.hf.parallel import divided
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import CACHE


@case
def one_was_given_a_cache() -> Any:
    model = shared("llama")
    with sparsekv.patch(model, **SMALL) as patch:
        given = {CACHE: DynamicCache(config=model.config)} if is_second() else {}
        return [tokens(model, **given) == tokens(whole("llama")), len(patch.notices.reasons)]


@case
def one_stops() -> Any:
    def stop(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(ids),), is_second() and ids.shape[1] > 41, device=ids.device)

    with sparsekv.patch(shared("llama"), **SMALL):
        return len(tokens(shared("llama"), stopping_criteria=[stop])[0])


@case
def a_criterion_fails() -> Any:
    def fail(ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if is_second() and ids.shape[1] > 41:
            raise KeyError("of one rank")
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    with sparsekv.patch(shared("llama"), **SMALL):
        return [failure(shared("llama"), stopping_criteria=[fail]), len(tokens(shared("llama"))[0])]


@case
def both_fail_alike() -> Any:
    model = shared("llama")
    with sparsekv.patch(model, **SMALL, max_tokens=64):
        found = [failure(model), failure(model, max_new_tokens=0)]
    return [*found, len(tokens(model)[0])]


@case
def what_the_first_is_told() -> Any:
    def ask() -> str:
        if is_second():
            raise AssertionError("the second rank has been asked")
        return "a line"

    def fail() -> None:
        raise EOFError

    told = Ranks.of_launch().told(ask, "a question")
    try:
        Ranks.of_launch().told(fail, "a question")
    except (EOFError, RankError) as error:
        return [told, str(error)]


@case
def one_is_elsewhere() -> Any:
    try:
        Ranks.of_launch().gather(1, "here" if is_second() else "there")
    except RankError as error:
        return str(error)


@case
def what_cannot_be_divided() -> Any:
    found = []
    for config in (LlamaConfig(**SIZES | {"num_key_value_heads": 1}), GptOssConfig()):
        try:
            found.append(str(divided(config)))
        except ConfigError as error:
            found.append(str(error))
    return found
