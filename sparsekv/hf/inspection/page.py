"""The page: one HTML file that holds its data, its script and its style, and loads nothing.

What each token read is a deflated array of bytes of its own, which the browser unpacks when the token is looked at.
"""

from __future__ import annotations

import base64
import html
import json
import os
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from torch import Tensor

from sparsekv.hf.inspection.recorder import NO_LEVEL, OCTAVES, READ, Recorder
from sparsekv.layer_budgets import told

if TYPE_CHECKING:
    from sparsekv.hf.patch import Patch

_HERE = Path(__file__).parent
_TEMPLATES = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
_FRAME = '<iframe sandbox="allow-scripts" style="width: 100%; height: 60rem; border: 0" srcdoc="{}"></iframe>'


@dataclass(frozen=True)
class Page:
    """A page to look at: a notebook shows it, `save` makes a file of it.

    Attributes:
        html: the file's content.
        answer: what the model said.
    """

    html: str = field(repr=False)
    answer: str

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the file. Raises OSError if it cannot be written."""
        Path(path).write_text(self.html, encoding="utf-8", newline="\n")

    def _repr_html_(self) -> str:
        return _FRAME.format(html.escape(self.html))


def page(
    patch: Patch,
    recorder: Recorder,
    text: str,
    starts: Sequence[int],
    question: str,
    pieces: Sequence[str],
    answer: str,
) -> Page:
    """The page of an answer.

    Args:
        recorder: has seen a step for every piece.
        text: what the model was given; `starts`: where in it each token begins.
        question: as it was asked.
        pieces: the answer's tokens as text; answer: without those that only a model needs.
    """
    steps = [recorder.steps[length] for length in sorted(recorder.steps)]
    layers = sorted(steps[0])
    about = {
        "answer": pieces,
        "pages": _pages(text, starts, pieces, patch.config.page_size),
        "pageSize": patch.config.page_size,
        "layers": [{"index": layer, "heads": len(steps[0][layer].pages)} for layer in layers],
        "budgets": recorder.budgets,
        "budget": told(patch.config.budget),
        "codes": {"read": READ, "noLevel": NO_LEVEL, "octaves": OCTAVES},
    }
    shares = torch.stack([torch.cat([step[layer].shares for layer in layers]) for step in steps])
    made = _TEMPLATES.get_template("page.html.jinja").render(
        title=f"What {_name(patch.model)} read",
        settings=str(patch).splitlines()[0],
        question=question,
        answer=answer.strip(),
        about=json.dumps(about, ensure_ascii=False).replace("<", "\\u003c"),
        shares=_packed(shares),
        steps=[_packed(torch.cat([step[layer].pages for layer in layers])) for step in steps],
        script="\n".join((_HERE / name).read_text(encoding="utf-8") for name in ("reading.js", "page.js")),
    )
    return Page(made, answer)


def _name(model: Any) -> str:
    """What a reader knows the model as: its folder, without the checksum that those of fetched models end in."""
    return re.sub(r"-[0-9a-f]{12}$", "", Path(str(model.config.name_or_path)).name) or type(model).__name__


def _pages(text: str, starts: Sequence[int], pieces: Sequence[str], page_size: int) -> list[str]:
    """The text of every page; the answer's last token is in none, as nothing was read after it."""
    begins, whole = list(starts), text
    for piece in pieces[:-1]:
        begins.append(len(whole))
        whole += piece
    cuts = [*begins[::page_size], len(whole)]
    return [whole[start:end] for start, end in pairwise(cuts)]


def _packed(values: Tensor) -> str:
    """An array's bytes, deflated, in base64."""
    return base64.b64encode(zlib.compress(values.numpy().tobytes())).decode()
