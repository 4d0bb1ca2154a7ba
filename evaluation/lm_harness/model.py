"""lm_eval's transformers model, patched: what `--model sparsekv` stands for.

lm_eval hands over prompts that end with the question. An ordinary `generate` would put the question into the dense
prefill, where it has collected its answer before the first sparse step. So the end of each prompt is decoded here,
token by token, like the answer.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, fields
from inspect import signature
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from torch import Tensor

import sparsekv
from sparsekv import DIGESTS, POLICIES, PagedCache, Patch, SparseConfig
from sparsekv.command_line import choose_device
from sparsekv.errors import ConfigError, SparseKVError, did_you_mean
from sparsekv.evaluation.accuracy.asking import prefill, stepper
from sparsekv.hf.models import located
from sparsekv.hf.support import CACHE

from .command import NAME

_FIELDS = tuple(field.name for field in fields(SparseConfig))
_OURS = ("tail", *_FIELDS)
_UNEXPECTED = re.compile(r"unexpected keyword argument '(\w+)'")
_NOT_DECODED = (
    "Log-likelihood tasks score whole texts in one dense pass and never decode: these figures are dense attention's, "
    "whatever the budget. Tasks that generate (generate_until) decode sparsely."
)
_NO_ROOM = "No prompt exceeded the budget, so every step read everything: take longer prompts or a smaller budget."


@register_model(NAME)
class SparseLM(HFLM):
    """HFLM whose model is patched.

    Args:
        pretrained: a name on the hub, a folder, a .gguf file, `testbed` (the small model that ships), or a model.
        tail: tokens of each prompt's end that are decoded one by one. It should cover the question, and what a chat
            template puts behind it. Our own tasks say how long their questions are: then it is at least that.
        device: default: the GPU if there is one.
        model_args: HFLM's own, and every setting of `SparseConfig`. `backend` is the latter's: no encoder-decoder can
            be patched.

    Raises:
        ConfigError, UnknownNameError: a setting is not allowed.
        UnsupportedModelError: the model cannot be served.
    """

    def __init__(self, pretrained: Any, tail: int = 64, device: str | None = None, **model_args: Any) -> None:
        settings = {name: model_args.pop(name) for name in _FIELDS if name in model_args}
        config = _config(settings)
        if isinstance(tail, bool) or not isinstance(tail, int) or tail < 1:
            raise ConfigError(f"tail={tail!r} must be a whole number of tokens, at least 1.")
        self.tail = self._min_tail = tail
        try:
            device = device or str(choose_device("auto"))
            if isinstance(pretrained, str):
                pretrained, of_gguf = located(pretrained)
                model_args = {**of_gguf, **model_args}
            super().__init__(pretrained, backend="causal", device=device, **model_args)
        except TypeError as error:
            unknown = _UNEXPECTED.search(str(error))
            if unknown is None:
                raise
            hint = did_you_mean(unknown[1], [*_OURS, *signature(HFLM).parameters])
            raise ConfigError(
                f"model_args: there is no {unknown[1]}.{hint} Beside those of lm_eval's `hf` model there are: "
                f"{', '.join(_OURS)}."
            ) from error
        self.patch: Patch = sparsekv.patch(self.model, config)
        self._chooses = not POLICIES.get(config.policy).reads_all

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Generates as HFLM does; then says what was read."""
        self._cover_questions(requests)
        said: list[str] = super().generate_until(requests, disable_tqdm=disable_tqdm)
        stats = self.patch.stats
        if self.rank == 0:
            print(stats, file=sys.stderr)
        if self._chooses and stats.dense_steps and not stats.sparse_steps:
            warnings.warn(_NO_ROOM)
        return said

    def loglikelihood(self, *args: Any, **kwargs: Any) -> Any:
        """Scores as HFLM does, in dense passes."""
        warnings.warn(_NOT_DECODED)
        return super().loglikelihood(*args, **kwargs)

    def loglikelihood_rolling(self, *args: Any, **kwargs: Any) -> Any:
        """Scores as HFLM does, in dense passes."""
        warnings.warn(_NOT_DECODED)
        return super().loglikelihood_rolling(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """What the file of results says: the settings, and what was read."""
        ours = {"version": sparsekv.__version__, "tail": self.tail, **asdict(self.patch.config)}
        return {**super().get_model_info(), NAME: {**ours, **self.patch.stats.as_dict()}}

    @torch.inference_mode()
    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **arguments: Any) -> Tensor:
        """Continues a batch of prompts, padded on the left."""
        mask = arguments["attention_mask"]
        before = self.patch.stats.sparse_steps
        with torch.autocast(self.device.type, self.mixed_precision_dtype, self.mixed_precision_dtype is not None):
            cache = self._all_but_one(context, mask)
        copies = max(arguments.get("num_beams") or 1, arguments.get("num_return_sequences") or 1)
        if copies > 1:
            cache.batch_repeat_interleave(copies)
        said: Tensor = super()._model_generate(context, max_length, stop, **{CACHE: cache}, **arguments)
        self._check_counters(int(mask.sum(1).max()), before)
        return said

    def _all_but_one(self, context: Tensor, mask: Tensor) -> PagedCache:
        """A cache of the prompts without their last token, which `generate` takes."""
        cache, num_tail = self.patch.new_cache(), self._tail_of(mask)
        if num_tail == 0:  # a prompt of one token
            return cache
        rows = [row[valid.bool()][:-num_tail].tolist() for row, valid in zip(context, mask, strict=True)]
        prefill(self.model, rows, cache)
        step = stepper(self.patch, num_tail)
        positions = mask.cumsum(1) - 1
        for column in range(context.shape[1] - num_tail, context.shape[1] - 1):
            step(
                input_ids=context[:, column : column + 1], attention_mask=mask[:, : column + 1],
                position_ids=positions[:, column : column + 1], **{CACHE: cache}, use_cache=True,
            )  # fmt: skip
        return cache

    def _tail_of(self, mask: Tensor) -> int:
        """Tokens to be decoded. A prompt's first token cannot be: the cache begins with it."""
        shortest, longest = int(mask.sum(1).min()), int(mask.sum(1).max())
        if longest > self.tail >= shortest:
            warnings.warn(
                f"A prompt of {shortest} tokens is in a batch with longer ones, so only the last {shortest - 1} of "
                f"each are decoded, instead of tail={self.tail}: use batch_size=1 if questions are longer than that."
            )
        return min(self.tail, shortest - 1)

    def _cover_questions(self, requests: Sequence[Any]) -> None:
        """A question whose beginning is left in the dense prefill has begun to collect its answer there."""
        told = [doc.get("prompt_tokens") for x in requests if isinstance(doc := getattr(x, "doc", None), dict)]
        longest = max((count for count in told if isinstance(count, int)), default=0)  # as far as tasks tell it
        self.tail = max(self._min_tail, longest)
        if longest > self._min_tail:
            warnings.warn(
                f"The longest question has {longest} tokens, and tail={self._min_tail}: the last {longest} of each "
                f"prompt are decoded. With a chat template, which puts more behind the question, give a larger tail."
            )

    def _check_counters(self, longest: int, before: int) -> None:
        """Sparse decoding is never taken for granted: else dense would be compared with dense."""
        exceeds = any(each.pages_for(longest) > each.budget_pages(longest) for each in self.patch.config.each)
        if self._chooses and exceeds and self.patch.stats.sparse_steps == before:
            raise SparseKVError(
                f"A prompt of {longest} tokens exceeds the budget, and yet no step was sparse:\n{self.patch}\n"
                "Take another model or dense_layers, or policy=all if dense decoding is meant."
            )


def _config(settings: dict[str, Any]) -> SparseConfig:
    """Checked in full before a model is loaded."""
    layers = settings.get("dense_layers")
    if isinstance(layers, list):  # model_args may be JSON, which has no tuples
        settings["dense_layers"] = tuple(layers)
    config = SparseConfig.of(**settings)
    DIGESTS.get(config.digest), POLICIES.get(config.policy)
    return config
