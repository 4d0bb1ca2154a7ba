"""Which cache a patched model's `generate` and plain forward get."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers
from packaging.version import Version
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation import (
    EosTokenCriteria,
    GenerationMode,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)

from sparsekv.cache import PagedCache
from sparsekv.cache.layer_kinds import latent_dims
from sparsekv.cache.masks import visible_columns
from sparsekv.config import SparseConfig
from sparsekv.errors import CacheStateError
from sparsekv.hf.attention import original_implementation
from sparsekv.hf.capture.decoder import CapturedDecoder, Run
from sparsekv.hf.chunks import chunk_size
from sparsekv.hf.notices import Notices, Reason, reason_in_cache, reason_in_model
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import CACHE, CACHE_NAMES, text_config

AHEAD = 8192  # new tokens of a sequence that memory is reserved for before the first: a captured step need not move
MakeCache = Callable[[int], PagedCache]  # tokens to reserve over all sequences -> cache
Method = Callable[..., Any]  # what the model had under the name before it was patched

# Before, the chunks of a later turn began with what is in the cache already.
_CHUNKS_LATER_TURNS = Version(transformers.__version__) >= Version("5.21")
_TEXT = {"attention_mask", "position_ids"}
_DYNAMIC = (None, "dynamic")
_STATIC = ("static",)
_OF_TOKENS = (EosTokenCriteria, MaxLengthCriteria, StopStringCriteria)  # which are the same in every rank


def prepare_cache(
    model: PreTrainedModel,
    own: Method,
    make_cache: MakeCache,
    notices: Notices,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    generation_mode: Any,
    batch_size: int,
    max_cache_length: int,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's `_prepare_cache_for_generation`: a PagedCache where generate would make its default or static one.

    A call that cannot have one (`_reason_for_dense`) goes to the model's own method, with a notice. The arguments
    after `notices` are transformers', which are changed in place: `model_kwargs` gets the cache, and both may get
    what lets a long prompt go through in chunks.

    Raises:
        CacheFullError: a draft by early exit may find no room. In its midst, the model would be left cut short.
    """
    is_assisted = generation_mode is GenerationMode.ASSISTED_GENERATION
    given = model_kwargs.get(CACHE)
    is_paged = _is_paged(given)
    reason = None if is_paged else _reason_for_dense(model, generation_config, model_kwargs, is_assisted)
    reason = Ranks.of(model).first(reason, "the choice of a cache")
    if reason is None:  # an assistant takes over the chunks of the model that it helps, for all its turns
        expands = latent_dims(text_config(model)) is not None
        _chunk_prefill(generation_config, model_kwargs, batch_size, is_assisted, expands)
        if getattr(generation_config, "assistant_early_exit", None) is not None:
            make_cache(0).check_room(batch_size, max_cache_length)  # of the draft
    elif given is None or not _wants_attentions(model, vars(generation_config)):
        notices.add(reason)
    if is_paged or reason is not None:
        return own(generation_config, model_kwargs, generation_mode, batch_size, max_cache_length, *args, **kwargs)
    cache = make_cache(_reserved(model, generation_config, model_kwargs, batch_size, max_cache_length))
    if getattr(generation_config, "is_assistant", False):
        cache.activate_past_recording()
    model_kwargs[CACHE] = cache
    return None


def _chunk_prefill(
    generation_config: Any, model_kwargs: dict[str, Any], batch_size: int, has_later_turns: bool, expands: bool
) -> None:
    """Lets generate prefill a long prompt of nothing but text in chunks, so that what lies between the layers stays
    small. `generation_config` is this call's own."""
    columns, past = _columns(model_kwargs), _past(model_kwargs)
    only_text = not {name for name, x in model_kwargs.items() if isinstance(x, Tensor)} - _TEXT
    if generation_config.prefill_chunk_size is not None or not only_text or columns is None:
        return
    if generation_config.output_attentions or generation_config.output_hidden_states:  # of all tokens, in one piece
        return
    if (past or has_later_turns) and not _CHUNKS_LATER_TURNS:
        return
    rows = max(batch_size, columns.shape[-2])  # expanded for beams already
    generation_config.prefill_chunk_size = chunk_size(rows, columns.shape[-1] - past, expands)


def _past(model_kwargs: dict[str, Any]) -> int:
    """How many columns are in the cache already."""
    cache = model_kwargs.get(CACHE)
    return 0 if cache is None else int(cache.get_seq_length())


def _columns(model_kwargs: dict[str, Any]) -> Tensor | None:
    """A tensor `[..., n]` with a column for every token so far, the prompt's included, if there is one."""
    mask = model_kwargs.get("attention_mask")  # None if all are ones
    columns: Tensor | None = model_kwargs.get("position_ids") if mask is None else mask
    return columns


def _reserved(
    model: PreTrainedModel,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    batch_size: int,
    max_cache_length: int,
) -> int:
    """Tokens to reserve memory for, over all sequences: as many as there can be where the user asks for a static
    cache; on a GPU the prompt and up to AHEAD new tokens, so that a captured step stays where it is; else, and for
    beams, which share pages, none."""
    beams = generation_config.num_beams or 1
    rows = batch_size * max(beams, generation_config.num_return_sequences or 1)
    if generation_config.cache_implementation in _STATIC:
        return rows * max_cache_length
    if model.device.type != "cuda" or beams > 1:
        return 0
    columns = _columns(model_kwargs)
    if columns is not None:
        prompt = columns.shape[-1]
    else:
        prompt = max(0, max_cache_length + 1 - (generation_config.max_new_tokens or max_cache_length + 1))
    return int(rows * min(max_cache_length, prompt + AHEAD))


def prefill(
    own: Method,
    decoder: CapturedDecoder,
    input_ids: Tensor,
    generation_config: Any,
    model_kwargs: dict[str, Any],
    *args: Any,
    **kwargs: Any,
) -> Any:
    """The model's `_prefill`: a long prompt that a PagedCache takes runs fused where that is allowed."""
    columns, num_new = _columns(model_kwargs), 0
    if columns is not None and isinstance(model_kwargs.get(CACHE), PagedCache):
        num_new = columns.shape[-2] * (columns.shape[-1] - _past(model_kwargs))
    with decoder.around_prompt(num_new):
        return own(input_ids, generation_config, model_kwargs, *args, **kwargs)


def may_capture(own: Method, config: SparseConfig, model_kwargs: dict[str, Any], generation_config: Any) -> bool:
    """The model's `_valid_auto_compile_criteria`: whether the decode loop goes to `decode_call`."""
    if isinstance(model_kwargs.get(CACHE), PagedCache):
        return config.capture and not generation_config.disable_compile
    compiled: bool = own(model_kwargs, generation_config)
    return compiled


def decode_call(own: Method, decoder: CapturedDecoder, compile_config: Any) -> Callable[..., Any]:
    """The model's `get_compiled_call`: what a decode loop calls in the model's place."""
    run = Run()

    def call(**inputs: Any) -> Any:
        if isinstance(inputs.get(CACHE), PagedCache):
            return decoder(run, **inputs)
        return own(compile_config)(**inputs)

    return call


def generate_together(own: Method, ranks: Ranks, *args: Any, **kwargs: Any) -> Any:
    """The model's `generate`, where several ranks hold it: it fails in all of them or in none."""
    with ranks.together("generate"):
        return own(*args, **kwargs)


def agreed_criteria(own: Method, ranks: Ranks, *args: Any, **kwargs: Any) -> StoppingCriteriaList:
    """The model's `_get_stopping_criteria`, where several ranks hold it. What may differ among them (by clocks, or by
    functions of the user) they decide together after every token; what follows from the tokens costs nothing."""
    found = own(*args, **kwargs)
    return StoppingCriteriaList(x if isinstance(x, _OF_TOKENS) else partial(_stops, ranks, x) for x in found)


def _stops(ranks: Ranks, criterion: Method, *args: Any, **kwargs: Any) -> Tensor:
    """Of every sequence whether any rank ends it, `[b]`."""
    mine: Tensor = criterion(*args, **kwargs)
    said = ranks.gather(mine.tolist(), "a stopping criterion")
    return torch.tensor(said, dtype=torch.bool, device=mine.device).any(0)


def _reason_for_dense(
    model: PreTrainedModel, generation_config: Any, model_kwargs: dict[str, Any], is_assisted: bool
) -> Reason | None:
    """Why a call of generate without a PagedCache gets none."""
    reason = reason_in_model(model, generation_config.use_cache is False)
    given, wanted = model_kwargs.get(CACHE), generation_config.cache_implementation
    if reason is None and getattr(generation_config, "is_assistant", False) and getattr(model, "_is_stateful", False):
        reason = Reason("states cannot drop a draft's tokens again", "Draft with a model that has none.")
    if reason is not None or given is not None:
        return reason or reason_in_cache(given)
    if wanted not in _DYNAMIC + _STATIC:
        return Reason(
            f"cache_implementation={wanted!r} is transformers' own cache",
            "Leave it out (or use 'static') to decode sparsely.",
        )
    if is_assisted and _wants_attentions(model, vars(generation_config)):  # of each verification, also of one token
        return Reason("output_attentions in assisted decoding", "Leave either out to decode sparsely.")
    return None


class ForwardHook:
    """The decoder's forward pre-hook: gives a plain forward a PagedCache, and refuses what would not fit in one.

    Args:
        make_cache: makes that cache.
        notices: told of a decode step that is dense for want of one.
        parameters: names of the forward's parameters, in order.
    """

    def __init__(self, make_cache: MakeCache, notices: Notices, parameters: tuple[str, ...]) -> None:
        self.make_cache, self.notices, self.parameters = make_cache, notices, parameters
        self._name = next((name for name in CACHE_NAMES if name in parameters), CACHE)
        self._place = parameters.index(self._name) if self._name in parameters else len(parameters)
        self._has_warned = False

    def __call__(
        self, module: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments that the forward gets instead.

        Raises:
            CacheFullError, CacheStateError: the cache cannot take these tokens; nothing was written.
        """
        named = dict(zip(self.parameters, args, strict=False)) | kwargs
        given = next((named[name] for name in CACHE_NAMES if named.get(name) is not None), None)
        reason = reason_in_model(module, not _uses_cache(module, named))
        if given is None and reason is None:
            given = self.make_cache(0)
            args, kwargs = self._with_cache(given, args, kwargs)
        if isinstance(given, PagedCache):
            _check_input(module, given, named)
            self._warn_of_attentions(module, named)
        elif "continuous_batching" in type(given).__module__:
            self.notices.add(Reason("generate_batch has a cache of its own", "Call generate to decode sparsely."))
        elif given is not None and _is_step(named) and not (_is_paged(given) or _wants_attentions(module, named)):
            self.notices.add(reason or reason_in_cache(given))
        return args, kwargs

    def _with_cache(
        self, cache: PagedCache, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments with the cache where None was, and else as they came: a forward may have been replaced by one
        that names them otherwise."""
        if self._place < len(args):
            return (*args[: self._place], cache, *args[self._place + 1 :]), kwargs
        others = {name: x for name, x in kwargs.items() if name not in CACHE_NAMES}  # which are None
        return args, others | {self._name: cache}

    def _warn_of_attentions(self, module: PreTrainedModel, arguments: dict[str, Any]) -> None:
        if self._has_warned or not _is_step(arguments) or not _wants_attentions(module, arguments):
            return
        self._has_warned = True
        warnings.warn(
            "output_attentions: a decode step that reads pages has no attention weights, so there are none in its "
            "output (prompts have theirs). To get all of them undo the patch, or pass "
            f"{CACHE}=DynamicCache(config=model.config).",
            stacklevel=2,
        )


def _is_paged(cache: Any) -> bool:
    """Whether a cache is a PagedCache, or has one beside that of a cross-attention."""
    return isinstance(getattr(cache, "self_attention_cache", cache), PagedCache)


def _uses_cache(module: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    use_cache = arguments.get("use_cache")
    return bool(getattr(module.config, "use_cache", True) if use_cache is None else use_cache)


def _wants_attentions(module: PreTrainedModel, arguments: dict[str, Any]) -> bool:
    """Whether attention weights are asked for that the model would give unpatched."""
    wanted = arguments.get("output_attentions")
    wanted = getattr(module.config, "output_attentions", False) if wanted is None else wanted
    return bool(wanted) and original_implementation(module.config) == "eager"


def _is_step(arguments: dict[str, Any]) -> bool:
    inputs = _inputs(arguments)
    return inputs is not None and inputs.shape[1] == 1


def _inputs(arguments: dict[str, Any]) -> Tensor | None:
    """The new tokens `[b, t]`, or their embeddings `[b, t, hidden]`."""
    embeds = arguments.get("inputs_embeds")
    return embeds if embeds is not None else arguments.get("input_ids")


def _check_input(module: PreTrainedModel, cache: PagedCache, arguments: dict[str, Any]) -> None:
    """Before the first layer takes anything: there must be room, and nobody may expect gradients."""
    if module.training:
        raise CacheStateError("A PagedCache carries no gradients: call model.eval(), or train without a cache.")
    inputs, mask = _inputs(arguments), arguments.get("attention_mask")
    if inputs is not None:
        batch_size, num_new = inputs.shape[:2]
        cache.check_room(batch_size, num_new, _visible(mask, cache, num_new))


def _visible(mask: Any, cache: PagedCache, num_new: int) -> Tensor | None:
    """Which columns a forward's mask shows, `[b, n]` bool; None: all. Where it does not say, as before."""
    if mask is None:
        return None
    visible = visible_columns(mask) if isinstance(mask, Tensor) else None
    is_whole = visible is not None and visible.shape[1] == cache.get_seq_length() + num_new
    return visible if is_whole else cache.visible
