"""`patch` and `unpatch`: sparse decoding for one model, in one call, undone in full."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from sparsekv.cache import DecodeStats, PagedCache
from sparsekv.config import SparseConfig
from sparsekv.digests import DIGESTS
from sparsekv.errors import PatchError
from sparsekv.hf import attention, documents, generation, support
from sparsekv.hf.capture.decoder import CapturedDecoder
from sparsekv.hf.documents import Prefix
from sparsekv.hf.fingerprint import Origin
from sparsekv.hf.memory import Memory, memory
from sparsekv.hf.notices import Notices, attention_set_since
from sparsekv.hf.ranks import Ranks
from sparsekv.layer_budgets import told
from sparsekv.pages import Arena
from sparsekv.pages.pieces import Progress
from sparsekv.policies import POLICIES

if TYPE_CHECKING:
    from sparsekv.hf.inspection import Page
    from sparsekv.hf.wording import Wording

_ATTRIBUTE = "_sparsekv_patch"
_PREPARE = "_prepare_cache_for_generation"
_PREFILL = "_prefill"
_MAY_COMPILE = "_valid_auto_compile_criteria"
_COMPILED = "get_compiled_call"
_GENERATE = "generate"
_CRITERIA = "_get_stopping_criteria"


class Patch:
    """A patch in force, as `patch` returns it. Also a context manager, which undoes it at the end.

    Attributes:
        model: the patched model (the one within it that generates, where that is another).
        config: the settings.
        layers: what each layer does when it decodes; a layer found unfit at its first use turns dense, with a reason.
        stats: what the decode steps of all caches made by this patch have read.
        decoder: the captured decode steps of `generate`, and how often they were captured and replayed.
        notices: why calls decoded densely, if any did: a cache of another kind was given, say.
    """

    def __init__(self, model: PreTrainedModel, config: SparseConfig, layers: list[support.LayerStatus]) -> None:
        self.model, self.config, self.layers = model, config, layers
        self.stats = DecodeStats()
        self.decoder = CapturedDecoder(model, config, layers)
        self.notices = Notices()
        self.is_active = False
        self._arena = Arena()
        self._before: dict[str, Any] = {}  # what the model itself had under the names of our methods, or None
        self._hook: RemovableHandle | None = None

    def new_cache(self, reserve_tokens: int = 0) -> PagedCache:
        """A cache as `generate` gets it, to be passed as `past_key_values` (and kept for the next turn).

        Args:
            reserve_tokens: tokens to allocate memory for at once, of all sequences together: for a batch of 4 that
                will hold 1,000 tokens each, 4,000. More than `max_tokens` is not reserved; what is not reserved is
                allocated when it is needed.
        """
        text = support.text_config(self.model)
        return PagedCache(
            text,
            self.config.up_to(len(DynamicCache(config=text).layers)),  # while a model exits early it has fewer
            stats=self.stats,
            reserve_tokens=reserve_tokens,
            on_fallback=partial(_turn_dense, self.layers),  # no reference to the model: caches are copied and pickled
            on_notice=self.notices.say,
            arena=self._arena if self._captures else None,
            origin=Origin(self.model),
        )

    def load(
        self,
        path: str | os.PathLike[str],
        prompt_ids: Tensor | None = None,
        reserve_tokens: int = 0,
        progress: Progress = lambda nbytes: None,
    ) -> PagedCache:
        """The cache that `PagedCache.save` has written to a file, bit for bit, to be passed as `past_key_values`.

        Args:
            prompt_ids: `[b, n]`, what is to be asked: tokens of the file are kept up to where the two differ, but not
                the prompt's last one, which says what comes next. A file of one sequence serves all rows. None: all.
            reserve_tokens: tokens to allocate memory for at once, as in `new_cache`.
            progress: called with the number of bytes that are done since the last call.

        Raises:
            CacheFileError: the file is torn, or of another model, other settings, or of nothing that the prompt
                begins with.
            CacheStateError: the prompt ends or differs within the file, where a layer cannot drop what it has read
                (windows, states); or several ranks hold the model.
            CacheFullError, OutOfMemoryError: there is no room.
        """
        return documents.load(self, path, prompt_ids, reserve_tokens, progress)

    def prefix(
        self,
        document: str | Sequence[int] | Tensor,
        tokenizer: Any = None,
        reserve_tokens: int = 0,
        progress: Progress = lambda num_tokens: None,
    ) -> Prefix:
        """Reads a document for many questions about it, which share its pages:
        `model.generate(**patch.prefix(text, tokenizer).inputs(["Who ...?", "Where ...?"]))`.

        Args:
            document: its text, or its tokens.
            tokenizer: for text.
            reserve_tokens: tokens that memory is allocated for at once, beside those of the document: for questions
                and answers together.
            progress: called with the number of tokens that are read since the last call.

        Raises:
            ConfigError: it has no tokens, or text is given and no tokenizer.
        """
        return documents.prefix(self, document, tokenizer, reserve_tokens, progress)

    def memory(self, context: int, batch: int = 1, limit: int | None = None) -> Memory:
        """What `generate` takes of the memory for so many tokens, before it is tried; print it.

        Args:
            context: tokens of a sequence, those to be generated counted; batch: sequences.
            limit: bytes of the device; None: those of the GPU that the model is on.

        Raises:
            ConfigError: `context` or `batch` is below 1.
        """
        device = self.model.device
        if limit is None and device.type == "cuda":
            limit = torch.cuda.get_device_properties(device).total_memory
        return memory(self.model, self.config, context, batch, limit)

    def inspect(
        self,
        tokenizer: Any,
        document: str,
        question: str,
        max_new_tokens: int = 64,
        words: Wording | None = None,
    ) -> Page:
        """Asks a question about a document, greedily, and shows what each token of the answer read, by layer and kv
        head, beside what dense attention would have wanted, and what other budgets would have read.

        To know, it reads every key at every step, and no step is captured.

        Args:
            tokenizer: of the model, a fast one.
            max_new_tokens: of the answer, at most.
            words: what stands around document and question (`sparsekv.hf.wording`); None: the model's chat template,
                or plain text if it has none.

        Returns:
            An HTML page that needs nothing else: a notebook shows it, `page.save("page.html")` makes a file of it.

        Raises:
            ConfigError: document or question are blank, or too long for the model; the tokenizer or its chat template
                cannot be used; or no layer chooses what it reads.
            PatchError: the patch is undone.
        """
        from sparsekv.hf.inspection import inspect  # nothing else needs it

        return inspect(self, tokenizer, document, question, max_new_tokens, words)

    def free_memory(self) -> None:
        """Gives back the memory of the last cache, which is kept for the next one while decode steps are captured
        (on a GPU), and the captured steps. The next `generate` captures anew, also if that has failed before."""
        self._arena.clear()
        self.decoder.clear()

    def undo(self) -> None:
        """Makes the model what it was before; a second call does nothing. Caches made by the patch hold pages that
        only a patched model reads: `cache.to_dynamic()` makes plain ones of them."""
        if not self.is_active:
            return
        self._restore()
        self.free_memory()
        self.is_active = False

    def _apply(self) -> None:
        # Partials of bound methods, not closures: a deep copy of the model gets its own, and they can be pickled.
        model, decoder, ranks = self.model, support.decoder_of(self.model), Ranks.of(self.model)
        names = _PREPARE, _PREFILL, _MAY_COMPILE, _COMPILED, _GENERATE, _CRITERIA
        own = {name: getattr(model, name) for name in names}
        methods = {
            _PREPARE: partial(generation.prepare_cache, model, own[_PREPARE], self.new_cache, self.notices),
            _PREFILL: partial(generation.prefill, own[_PREFILL], self.decoder),
            _MAY_COMPILE: partial(generation.may_capture, own[_MAY_COMPILE], self.config),
            _COMPILED: partial(generation.decode_call, own[_COMPILED], self.decoder),
        }
        if ranks.size > 1:
            methods[_GENERATE] = partial(generation.generate_together, own[_GENERATE], ranks)
            methods[_CRITERIA] = partial(generation.agreed_criteria, own[_CRITERIA], ranks)
        # The class's names, not those of a function that somebody has put in front of it.
        parameters = tuple(inspect.signature(type(decoder).forward).parameters)[1:]
        hook = generation.ForwardHook(self.new_cache, self.notices, parameters)
        self._before = {name: vars(model).get(name) for name in methods}
        try:
            self._hook = decoder.register_forward_pre_hook(hook, with_kwargs=True)
            vars(model).update(methods)
            setattr(model, _ATTRIBUTE, self)
            config = support.text_config(model)
            is_special = support.has_sinks_or_softcaps(model)
            config._attn_implementation_internal = attention.AttentionName(config._attn_implementation, is_special)
        except BaseException:
            self._restore()
            raise
        self.is_active = True

    def _restore(self) -> None:
        """What the model was, however much of the patch is in place."""
        config = support.text_config(self.model)
        if attention.is_patched(config):  # else the user has set another since
            config._attn_implementation_internal = config._attn_implementation.original
        for name in (*self._before, _ATTRIBUTE):
            vars(self.model).pop(name, None)
        vars(self.model).update({name: own for name, own in self._before.items() if own is not None})
        if self._hook is not None:
            self._hook.remove()

    @property
    def _captures(self) -> bool:
        return self.config.capture and self.model.device.type == "cuda"

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        config, state = self.config, "" if self.is_active else ", undone"
        kv = "" if config.kv == "plain" else f", kv {config.kv}"
        prompts = f", sparse prompts of mass {config.prefill_mass:g}" if config.prefill == "sparse" else ""
        settings = f"budget {told(config.budget)}, page_size {config.page_size}{kv}{prompts}{state}"
        head = f"sparsekv patch of {type(self.model).__name__} ({settings})"
        steps = f"  decode steps on {self.model.device}: {support.kernel_status(self.model, config)}"
        dense = [f"  decoded densely: {reason}" for reason in self.notices.reasons]
        dense += [f"  {text}" for text in self.notices.others]
        return "\n".join([head, *self._layer_lines, steps, f"  decode loop of generate: {self._loop}", *dense])

    @property
    def _layer_lines(self) -> list[str]:
        reason = attention_set_since(self.model) if self.is_active else None
        if reason is None:
            return _layer_lines(self.layers)
        return _layer_lines([support.LayerStatus(status.layer_idx, False, reason) for status in self.layers])

    @property
    def _loop(self) -> str:
        """How generate's decode loop runs, for the report."""
        reason = self.decoder.why_eager(self.model.device)
        if reason is not None:
            return f"eager ({reason})"
        last = self.decoder.last_obstacle
        end = "" if last is None else f"; the last step was eager: {last}"
        return f"CUDA graphs ({self.decoder.captures} captured, {self.decoder.replays} replays{end})"


def patch(model: PreTrainedModel, config: SparseConfig | None = None, **settings: Any) -> Patch:
    """Makes `model` decode sparsely, in force at once: `generate` and plain forwards need no further change.

    Prefill and every forward of several tokens stay dense and the model's own, unless `prefill="sparse"`. Other
    models are not affected, in whatever thread they run. In training mode the model computes exactly what it computes
    unpatched.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> sizes = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "vocab_size": 100}
    >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))
    >>> with patch(model, budget=256, dense_layers=1) as made:
    ...     print(made)
    sparsekv patch of LlamaForCausalLM (budget 256 tokens, page_size 16)
      layer 0: dense (dense_layers=1, in pages)
      layers 1-3: sparse (top_k over sign_sketch digests)
    ...

    Args:
        model: a decoder-only transformers model whose attention is `eager`, `sdpa` or a flash attention. If its
            `generate` is that of a model within it (BLIP-2's language model), that one is patched.
        config: settings; or give single ones by name: `patch(model, budget=2048)` (tokens per kv head).

    Returns:
        The patch: printable, undoable (`undo`, or a `with` block), with the counters of what was read (`stats`).

    Raises:
        ConfigError, UnknownNameError: a setting is not allowed, or not for this model.
        UnsupportedModelError: the model cannot be served.
        PatchError: it is patched already, or was made with the config of a patched model.
        In every case the model is as it was.
    """
    settled = SparseConfig.of(config, **settings)
    DIGESTS.get(settled.digest), POLICIES.get(settled.policy)
    model = support.generating(model)
    if getattr(model, _ATTRIBUTE, None) is not None:
        raise PatchError(
            f"{type(model).__name__} is patched already: undo that first (patch.undo() or sparsekv.unpatch(model)), "
            "then patch it with the new settings."
        )
    if isinstance(model, PreTrainedModel) and attention.is_patched(support.text_config(model)):
        raise PatchError(
            f"{type(model).__name__} was made with the config of a patched model. Undo that patch before making "
            "another model from its config, or make the second one with copy.deepcopy(model)."
        )
    made = Patch(model, *support.examine(model, settled))
    made._apply()
    reasons = dict.fromkeys(status.reason for status in made.layers)
    if all(status.kind is None for status in made.layers):
        warnings.warn(
            f"sparsekv: {type(model).__name__} decodes as densely as it does unpatched: {'; '.join(reasons)}.",
            stacklevel=2,
        )
    return made


def unpatch(model: PreTrainedModel) -> None:
    """Undoes the patch of a model.

    Raises:
        PatchError: it is not patched.
    """
    made = getattr(support.generating(model), _ATTRIBUTE, None)
    if made is None:
        raise PatchError(f"{type(model).__name__} is not patched: nothing to undo.")
    made.undo()


def _turn_dense(layers: list[support.LayerStatus], layer_idx: int, reason: str) -> None:
    if all(status.reason != reason for status in layers):
        warnings.warn(
            f"sparsekv: layer {layer_idx}, if not others too, decodes densely: {reason}. print(patch) lists them.",
            stacklevel=4,
        )
    for status in [x for x in layers if layer_idx in (x.layer_idx, x.shares)]:
        layers[status.layer_idx] = support.LayerStatus(status.layer_idx, False, reason, is_in_place=False)


def _layer_lines(layers: list[support.LayerStatus]) -> list[str]:
    """One line for each run of layers that do the same."""
    lines = []
    for (is_sparse, reason), group in groupby(layers, key=lambda status: (status.is_sparse, status.reason)):
        run = [status.layer_idx for status in group]
        span = f"layer {run[0]}" if len(run) == 1 else f"layers {run[0]}-{run[-1]}"
        lines.append(f"  {span}: {'sparse' if is_sparse else 'dense'} ({reason})")
    return lines
