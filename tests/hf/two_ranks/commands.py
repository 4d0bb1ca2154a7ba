"""Commands, of which the first rank alone is typed to, speaks and writes."""

from __future__ import annotations

import io
import json
import os
import sys
import tempfile
from typing import Any
from unittest.mock import patch as replaced

import torch.distributed as dist
from models import FOLDER, case, is_second

from sparsekv.cli import main


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
