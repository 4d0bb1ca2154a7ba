"""What several ranks do together, for `test_ranks.py`: run by torchrun, each writes what came of every case.

    torchrun --nproc-per-node 2 tests/hf/two_ranks.py FOLDER cpu

A case is a function that both ranks run; what it gives is written before the next one begins, so a case that hangs is
the one that is missing. The last one tears the ranks.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch as replaced

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, GptOssConfig, LlamaConfig
from transformers.distributed import DistributedConfig
from transformers.utils import logging

import sparsekv
from sparsekv.cli import main
from sparsekv.errors import ConfigError, RankError
from sparsekv.hf import ranks
from sparsekv.hf.capture import decoder as decoders
from sparsekv.hf.parallel import divided
from sparsekv.hf.ranks import Ranks
from sparsekv.hf.support import CACHE
from sparsekv.testing.playing import Played, played

SIZES: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,
}
OF_GPUS = {"num_attention_heads": 8, "num_key_value_heads": 4}  # for up to four
_MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_STATES = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3_moe": _EXPERTS,
    "gpt_oss": {"num_local_experts": 4, "sliding_window": 8},
    "qwen3_next": {**_EXPERTS, **_STATES, "linear_value_head_dim": 16, "shared_expert_intermediate_size": 32}
    | {"layer_types": ["linear_attention", "full_attention"]},
    "gemma3_text": {"query_pre_attn_scalar": 16, "sliding_window": 8, "sliding_window_pattern": 2},
    "deepseek_v2": {**_MLA, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
    | {"n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "moe_intermediate_size": 32},
}
SMALL: dict[str, Any] = {"budget": 16, "page_size": 4, "sinks": 4, "recent": 4, "dense_layers": 0, "fuse": False}
FOLDER = Path(sys.argv[1])
PLAN = {"distributed_config": DistributedConfig(tp_plan="auto")}

CASES: dict[str, Callable[[], Any]] = {}
MODELS: dict[str, Any] = {}


def case(run: Callable[[], Any]) -> Callable[[], Any]:
    CASES[run.__name__] = run
    return run


def whole(family: str) -> Any:
    """A model that each rank holds alone."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family])
    return AutoModelForCausalLM.from_config(config).eval().to(device())


def shared(family: str) -> Any:
    """The same model, which both hold together."""
    if family not in MODELS:
        model = whole(family)
        config = copy.deepcopy(model.config)
        weights = {name: tensor.cpu() for name, tensor in model.state_dict().items()}
        MODELS[family] = type(model).from_pretrained(None, config=config, state_dict=weights, **PLAN).eval()
    return MODELS[family]


def device() -> torch.device:
    """This rank's."""
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def is_second() -> bool:
    return dist.get_rank() == 1


def generated(model: Any, new: int = 6, **settings: Any) -> Any:
    ids = torch.randint(3, 100, (2, 40), generator=torch.Generator().manual_seed(1)).to(device())
    wanted = {"do_sample": False, "max_new_tokens": new, "return_dict_in_generate": True, "output_logits": True}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **wanted | settings)


def tokens(model: Any, **settings: Any) -> list[list[int]]:
    found: list[list[int]] = generated(model, **settings).sequences[:, 40:].tolist()
    return found


def failure(model: Any, **settings: Any) -> str:
    try:
        return f"nothing: {tokens(model, **settings)}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def compared(family: str) -> Callable[[], Any]:
    """How far the logits of a model that is held together lie from those of one that is not. Of latents, which are
    one head for all, each rank chooses for its own query heads: there it is a policy that does not ask them."""

    def run() -> list[float]:
        found = []
        for budget in (256, 16):
            runs, policy = [], "recent" if family == "deepseek_v2" else "top_k"
            for model in (whole(family), shared(family)):
                with sparsekv.patch(model, **SMALL | {"budget": budget, "policy": policy}):
                    runs.append(generated(model).logits)
            found.append(max(float((a - b).abs().max()) for a, b in zip(*runs, strict=True)))
        return found

    return run


CASES |= {family: compared(family) for family in FAMILIES}


@case
def beams() -> Any:
    found = []
    for model in (whole("llama"), shared("llama")):
        with sparsekv.patch(model, **SMALL):
            found.append(tokens(model, num_beams=3))
    return found


@case
def heads_of_a_rank() -> Any:
    with sparsekv.patch(shared("llama"), **SMALL) as patch:
        cache = patch.new_cache()
        shared("llama")(input_ids=torch.ones(1, 12, dtype=torch.int64, device=device()), **{CACHE: cache})
        return cache.layers[0].keys.shape[1]


@case
def what_a_patch_changes() -> Any:
    found = []
    for model in (shared("llama"), whole("llama")):
        before = set(vars(model))
        with sparsekv.patch(model, **SMALL):
            found.append(sorted(set(vars(model)) - before))
    return [found[0], sorted(set(vars(shared("llama"))) & set(found[0])), found[1]]


# -- captured steps; on a CPU they are played


def as_graphs() -> contextlib.ExitStack:
    """Within it, steps are captured on any device, and memory goes from cache to cache."""
    stack = contextlib.ExitStack()
    if dist.get_backend() != "nccl":
        stack.enter_context(played())
        # A copy's hooks would lead back to the model anyway.
        stack.enter_context(replaced.object(Played, "frozen", staticmethod(lambda model: model)))
        stack.enter_context(replaced.object(sparsekv.Patch, "_captures", True))
    return stack


def captured(prepare: Callable[[sparsekv.Patch], Any] = lambda patch: None) -> list[Any]:
    """Two calls of generate, the second after `prepare`: whether each gave what eager steps give, how often a step
    was captured in it, how many steps were replayed, and why no more."""
    model, found = shared("llama"), []
    with as_graphs(), sparsekv.patch(model, **SMALL | {"budget": 32, "page_size": 8, "fuse": True}) as patch:
        expected = tokens(model, disable_compile=True, new=8)
        for before in (lambda patch: None, prepare):
            patch.decoder.captures = patch.decoder.replays = 0
            undo = before(patch)
            same = tokens(model, new=8) == expected
            found.append([same, patch.decoder.captures, patch.decoder.replays, patch.decoder.last_obstacle])
            if undo is not None:
                undo()
    return found


@case
def captured_twice() -> Any:
    return captured()


@case
def one_has_lost_its_graphs() -> Any:
    return captured(lambda patch: patch.decoder.clear() if is_second() else None)


@case
def another_weight_in_one() -> Any:
    def move(patch: sparsekv.Patch) -> None:
        if is_second():
            norm = patch.model.model.layers[0].input_layernorm
            norm.weight = torch.nn.Parameter(norm.weight.detach().clone())

    return captured(move)


@case
def one_finds_its_graph_wrong() -> Any:
    def doubt(patch: sparsekv.Patch) -> Any:
        same = replaced.object(decoders, "_same", lambda a, b: not is_second())
        same.start()
        return same.stop

    return captured(doubt)


def failing(error: Exception) -> Callable[[sparsekv.Patch], Any]:
    """Lets the second rank fail to capture anything anew."""

    def prepare(patch: sparsekv.Patch) -> Any:
        patch.decoder.clear()
        record = decoders.CapturedStep.record

        def fail(step: Any, *args: Any) -> None:
            record(step, *args)
            if is_second():
                raise error

        failed = replaced.object(decoders.CapturedStep, "record", fail)
        failed.start()
        return failed.stop

    return prepare


@case
def one_has_no_memory_for_a_graph() -> Any:
    return captured(failing(torch.OutOfMemoryError("CUDA out of memory.")))


@case
def one_cannot_capture() -> Any:
    return captured(failing(RuntimeError("operation not permitted")))


@case
def one_must_not_capture() -> Any:
    def observe(patch: sparsekv.Patch) -> Any:
        made = replaced.object(patch.decoder, "obstacle", lambda inputs: "a test" if is_second() else None)
        made.start()
        return made.stop

    return captured(observe)


# -- calls that do not go alike


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


# -- commands


def commanded(*arguments: str, typed: str = "") -> list[Any]:
    """The exit code of a command, and what was seen of it: whatever wrote it, to stdout and to stderr."""
    sys.stdout.flush(), sys.stderr.flush()
    seen = []
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        kept = [os.dup(place) for place in (1, 2)]
        os.dup2(out.fileno(), 1), os.dup2(err.fileno(), 2)
        try:
            with replaced.object(sys, "stdin", io.StringIO(typed)):
                code = main([*arguments])
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            for place, where in zip((1, 2), kept, strict=True):
                os.dup2(where, place)
        for file in (out, err):
            file.seek(0)
            seen.append(file.read())
    return [code, *seen]


@case
def the_command_generate() -> Any:
    words = ["generate", "--model", "testbed", "--prompt-file", "-", "--max-new-tokens", "6", "--budget", "128"]
    told = "once upon a time there was a"
    alone = commanded(*words[:3], "--prompt", told, *words[5:])
    return [commanded(*words, "--parallel", "tensor", typed="" if is_second() else told), alone[:2]]


@case
def the_command_chat() -> Any:
    document = FOLDER / "document.txt"
    if not is_second():
        document.write_text("once upon a time there was a lion .")
    typed = "" if is_second() else "what was there ?\n/stats\nwho was there ?\n"
    words = ["--document", str(document) if not is_second() else "nowhere", "--max-new-tokens", "4"]
    return commanded("chat", *words, "--parallel", "tensor", typed=typed)


@case
def the_command_eval() -> Any:
    options = ["--tasks", "passkey", "--lengths", "512", "--budgets", "128", "--examples", "1", "--methods", "quest"]
    folder = FOLDER / f"eval-{dist.get_rank()}"
    code, *_ = commanded("eval", "run", *options, "--out", str(folder), "--parallel", "tensor")
    return [code, sorted(path.name for path in folder.glob("*"))]


@case
def the_command_bench() -> Any:
    folder = FOLDER / f"bench-{dist.get_rank()}"
    options = ["--points", "1x300", "--budget", "128", "--new-tokens", "8", "--out", str(folder)]
    code, *_ = commanded("bench", "generate", "--model", "testbed", *options, "--parallel", "tensor")
    written = [json.loads(path.read_text()) for path in folder.glob("generate_cpu_2_ranks.json")]
    return [code, [[row["mode"], row["ranks"], row["cache_bytes"]] for content in written for row in content["rows"]]]


@case
def a_command_that_fails_in_the_first() -> Any:
    words = ["generate", "--model", "testbed", "--prompt-file", "-", "--parallel", "tensor"]
    return commanded(*words, typed=" " if is_second() else "")


@case
def what_cannot_be_divided() -> Any:
    found = []
    for config in (LlamaConfig(**SIZES | {"num_key_value_heads": 1}), GptOssConfig()):
        try:
            found.append(str(divided(config)))
        except ConfigError as error:
            found.append(str(error))
    return found


@case
def one_has_no_memory_for_the_prompt() -> Any:
    """The other waits for it in the middle of a layer: the last case, as the ranks are torn."""

    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    model = shared("llama")
    with sparsekv.patch(model, **SMALL):
        if is_second():
            model.model.layers[1].mlp.register_forward_pre_hook(fail)
        return failure(model)


def run_all(kind: str) -> None:
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    ranks.PATIENCE = 0.5
    if kind == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        SIZES.update(OF_GPUS)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    path = FOLDER / f"{dist.get_rank()}.jsonl"
    for name, run in CASES.items():
        if kind == "cuda" and name.startswith("the_command"):  # their models have two kv heads
            continue
        try:
            found = run()
        except Exception as error:
            found = f"{type(error).__name__}: {error}"
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps([name, found]) + "\n")


if __name__ == "__main__":
    run_all(sys.argv[2])
