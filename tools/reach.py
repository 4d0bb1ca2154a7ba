"""Makes the table of what is served: a tiny model of every type of the installed transformers decodes greedily,
unpatched and patched with a budget that covers its context, and the tokens must be the same.

    python -m tools.reach                      # evaluation/results/reach_VERSION.json and .md
    python -m tools.reach --only llama gemma2  # these anew; the rest of the table stays

Each type has a process of its own, so that one that crashes takes nothing with it.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import sparsekv
from sparsekv.command_line import circumstances
from sparsekv.commands.models import TYPES, UNBUILT
from sparsekv.evaluation.committed import RESULTS
from sparsekv.hf.support import CACHE, CACHE_NAMES
from tools.tiny_models import VOCAB, smallest

SETTINGS: dict[str, Any] = {"budget": 4096, "page_size": 4, "dense_layers": 0}
EQUAL, NOT_RUN, UNPATCHED_FAILS = "equal", "-", "the unpatched model fails"
_NEW_TOKENS = 6
_ROUNDING = 1e-3  # of logits, over their spread
_SECONDS = 300  # that a type may take

Row = dict[str, Any]
Mode = Callable[[PreTrainedModel], Any]

_PAGE = """# What is served: transformers {version}

{sums}

A tiny model of each type, with random weights, decodes greedily, unpatched and patched with a budget that covers its
context: one sequence alone, three padded on the left, assisted by prompt lookup, and a second turn over the cache of
a first. *equal*: the same tokens, and the same logits but for rounding. -: not run, as the type is refused, there is
no tiny model of it, or the unpatched one does not decode so. *captured*: whether the decode step is a CUDA graph on a
GPU, as far as the layers decide that. A checkpoint may have other layers than its type here: `sparsekv models NAME`.

`{command}`, {date}

{table}
"""


def _prompt(*lengths: int) -> dict[str, Tensor]:
    """A row of random tokens per length, padded on the left; the same at every call."""
    mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
    ids = torch.randint(3, VOCAB, mask.shape, generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids * mask, "attention_mask": mask.long()}


def _generate(model: PreTrainedModel, inputs: dict[str, Any], **settings: Any) -> Any:
    wanted = {"do_sample": False, "max_new_tokens": _NEW_TOKENS, "min_new_tokens": _NEW_TOKENS}
    wanted |= {"return_dict_in_generate": True, "output_logits": True}
    return model.generate(**inputs, **wanted | settings)


def _assisted(model: PreTrainedModel) -> Any:
    return _generate(model, _prompt(60), prompt_lookup_num_tokens=3, max_matching_ngram_size=1)


def _second_turn(model: PreTrainedModel) -> Any:
    inputs = _prompt(40)
    first = _generate(model, inputs)
    ids = torch.cat([first.sequences, inputs["input_ids"][:, :9]], dim=1)
    cache = next(found for name in CACHE_NAMES if (found := getattr(first, name, None)) is not None)
    return _generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: cache})


MODES: dict[str, Mode] = {
    "alone": lambda model: _generate(model, _prompt(40)),
    "padded": lambda model: _generate(model, _prompt(40, 33, 21)),
    "assisted": _assisted,
    "second turn": _second_turn,
}


def row_of(model_type: str) -> Row:
    """What is told of a type, and what its model did."""
    row = _row(model_type)
    try:
        model = smallest(model_type)
    except ValueError as error:
        return row | _told_by_default(model_type) | {"not_run": str(error)}
    told = sparsekv.supports(model, **SETTINGS)
    if told.refusal is None:
        row["turned_dense"] = _turned_dense(model)
        row["modes"] = {name: _compared(mode, model) for name, mode in MODES.items()}
    return row | told.as_dict()


def _row(model_type: str) -> Row:
    kind = "causal" if model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else "multimodal"
    return {"type": model_type, "kind": kind, "modes": dict.fromkeys(MODES, NOT_RUN)}


def _told_by_default(model_type: str) -> Row:
    """What is told of a type of which there is no tiny model."""
    try:
        return sparsekv.supports(CONFIG_MAPPING[model_type](), **SETTINGS).as_dict()
    except Exception:  # as in `sparsekv models`
        return {"verdict": UNBUILT}


@torch.no_grad()
def _turned_dense(model: PreTrainedModel) -> list[str]:
    """Why layers that were told to be sparse turned dense at their first use."""
    with sparsekv.patch(model, **SETTINGS) as patch:
        before = [status.reason for status in patch.layers]
        cache = patch.new_cache()
        for ids in ([[5, 6, 7]], [[8]]):
            model(input_ids=torch.tensor(ids), use_cache=True, **{CACHE: cache})
        return sorted({status.reason for status in patch.layers} - set(before))


def _compared(mode: Mode, model: PreTrainedModel) -> str:
    """How a patched model decodes beside the unpatched one."""
    try:
        theirs = mode(model)
    except Exception as error:  # whatever a model has against a way to decode
        return f"{UNPATCHED_FAILS}: {_told(error)}"
    try:
        with sparsekv.patch(model, **SETTINGS):
            ours = mode(model)
    except Exception as error:
        return f"crashes: {_told(error)}"
    if not torch.equal(ours.sequences, theirs.sequences):
        return "other tokens"
    pairs = zip(ours.logits, theirs.logits, strict=True)
    far = max(float((a - b).abs().max() / b.std()) for a, b in pairs)
    return EQUAL if far < _ROUNDING else f"other logits, by {far:.1g} of their deviation"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


# -- a process for each


def _answer(model_type: str, pipe: Connection) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    pipe.send(row_of(model_type))


def row_apart(model_type: str) -> Row:
    """`row_of`, in a process of its own."""
    fork = multiprocessing.get_context("fork")  # what is imported by now is imported once
    ours, theirs = fork.Pipe(duplex=False)
    process = fork.Process(target=_answer, args=(model_type, theirs))
    process.start()
    theirs.close()
    try:
        row: Row = ours.recv() if ours.poll(_SECONDS) else {}
    except EOFError:
        row = {}
    process.join(timeout=10)
    process.kill()  # if it still runs: a loop without end, say
    process.join()
    return row or _row(model_type) | {"verdict": "crashes", "not_run": f"exit code {process.exitcode}"}


# -- the table


def path_of(version: str) -> Path:
    """The table of a version of transformers: of 5.23.1 that of 5.23."""
    return RESULTS / f"reach_{'.'.join(version.split('.')[:2])}.json"


def is_right(row: Row) -> bool:
    """Whether nothing is wrong with a type: it decodes as unpatched in every way, and as it was told."""
    fine = row["verdict"] != "crashes" and not row.get("turned_dense")
    return fine and all(found.startswith((EQUAL, NOT_RUN, UNPATCHED_FAILS)) for found in row["modes"].values())


def markdown(result: dict[str, Any]) -> str:
    """The table for people."""
    header = ["type", "decodes", "layers", *MODES, "captured", "why not"]
    lines = [header, ["---"] * len(header), *map(_cells, result["rows"])]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return _PAGE.format(version=result["versions"]["transformers"], sums=_sums(result["rows"]), table=table, **result)


def _sums(rows: list[Row]) -> str:
    lines = []
    for kind in ("causal", "multimodal"):
        of_kind = [row for row in rows if row["kind"] == kind]
        counts = Counter(row["verdict"] for row in of_kind)
        told = ", ".join(f"{count} {verdict}" for verdict, count in counts.most_common())
        not_run = sum("not_run" in row for row in of_kind)
        lines.append(f"- {len(of_kind)} {kind} types: {told}; of {not_run} there is no tiny model")
    wrong = [row["type"] for row in rows if not is_right(row)]
    return "\n".join([*lines, f"- wrong: {', '.join(wrong) or 'none'}"])


def _cells(row: Row) -> list[str]:
    layers = [f"{part['layer_type']}: {part['decodes']}" for part in row.get("layers", ())]
    dense = [part["reason"] for part in row.get("layers", ()) if part["decodes"] == "dense"]
    reasons = [row["refusal"]] if row.get("refusal") else [*dense, *row.get("turned_dense", ())]
    if row.get("not_run"):
        reasons.append(f"not run: {row['not_run']}")
    captured = NOT_RUN if row["verdict"] not in ("sparse", "some", "dense") else "no" if row["why_eager"] else "yes"
    why = "; ".join(dict.fromkeys(reasons)).replace("|", "\\|")
    modes = [NOT_RUN if found.startswith(UNPATCHED_FAILS) else found for found in row["modes"].values()]
    return [row["type"], row["verdict"], ", ".join(dict.fromkeys(layers)), *modes, captured, why]


def _write(rows: dict[str, Row]) -> None:
    content = {
        **circumstances("python -m tools.reach"),
        "settings": SETTINGS,
        "rows": [rows[name] for name in TYPES if name in rows],
    }
    path = path_of(transformers.__version__)
    head = json.dumps(content | {"rows": []}, indent=1).removesuffix("[]\n}")
    lines = ",\n".join(f"  {json.dumps(row)}" for row in content["rows"])
    path.write_text(f"{head}[\n{lines}\n ]\n}}\n", encoding="utf-8")
    path.with_suffix(".md").write_text(markdown(content), encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Writes the table; returns 1 if a type is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="TYPE", choices=TYPES, help="these; the rest of the table stays")
    args = parser.parse_args(argv)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)  # configs complain of what is tried
    path, rows = path_of(transformers.__version__), {}
    if args.only and path.exists():
        rows = {row["type"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
    wanted = args.only or TYPES
    for i, model_type in enumerate(wanted, start=1):
        rows[model_type] = row = row_apart(model_type)
        modes = ", ".join(row["modes"].values())
        print(f"{i}/{len(wanted)} {model_type}: {row['verdict']}; {modes}; {row.get('not_run', '')}", flush=True)
        _write(rows)  # a sweep that is stopped goes on with --only
    return 0 if all(is_right(rows[name]) for name in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
