"""From a CUDA source in `cuda/` to a kernel that can be launched: NVRTC through NVIDIA's cuda-core, and a disk cache.

Nothing of this needs nvcc, a C++ compiler or, up to the loading, a GPU. cuda-core is imported only where it is used:
sparsekv works without it where there is no GPU.
"""

from __future__ import annotations

import functools
import logging
import os
import re
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from sparsekv.errors import KernelCompileError
from sparsekv.ops import kernel_files
from sparsekv.ops.kernel_files import Cubin, sha256
from sparsekv.user_cache import cache_directory

if TYPE_CHECKING:
    from cuda.core import Kernel

OLDEST_CAPABILITY = (8, 0)  # bf16 arithmetic and asynchronous copies
# Of cuda.core.ProgramOptions, beside the architecture and the include path. Generic lambdas must be device code.
OPTIONS: dict[str, Any] = {"std": "c++17", "device_as_default_execution_space": True}
SPECIFIC = {"sm_90": "sm_90a"}  # which has instructions that no later one has: a cubin is for one architecture anyway
DEBUG = os.environ.get("SPARSEKV_DEBUG") == "1"  # kernels that check how much shared memory they were given
if DEBUG:
    OPTIONS["define_macro"] = "SPARSEKV_DEBUG"

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.S)
# What picks an instantiation, divides its work and launches it.
_PLANNED_BY = ("instances.py", "launch.py", "plans.py", "rooms.py")

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class KernelSpec:
    """One instantiation of a kernel template.

    Attributes:
        source: a file of `cuda/`, such as "attend_pages.cu".
        expression: what NVRTC is asked for, such as "attend_pages<bf16, 128, 1>".
        headers: what is included before the source: below `cuda/`, or absolute.
        claim: an expression in C++ that must be true; what Python has counted for the kernel, say.
    """

    source: str
    expression: str
    headers: tuple[str, ...] = ()
    claim: str = "true"

    def __str__(self) -> str:
        return f"{self.expression} of {self.source}"


class Obstacle(NamedTuple):
    """Why kernels cannot be compiled or run, and what to do about it."""

    why: str
    remedy: str


def sources_dir() -> Path:
    """The folder `cuda/`: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "cuda"
    return installed if installed.is_dir() else package.parent / "cuda"


@functools.cache
def obstacle(device: int | None = None) -> Obstacle | None:
    """What keeps kernels from being compiled here and, if a CUDA device is named, from running on it."""
    return _no_compiler() or _no_sources() or (None if device is None else _unfit(device))


def unavailable(device: int | None = None) -> str | None:
    """`obstacle(device)` as a sentence, or None if there is none."""
    found = obstacle(device)
    return found and f"{found.why}. Remedy: {found.remedy}."


def _no_compiler() -> Obstacle | None:
    try:
        import cuda.core  # noqa: F401

        nvrtc_version()
    except Exception as error:  # an ImportError, or one of several classes for a library that cannot be loaded
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        return Obstacle(f"cuda-core or its NVRTC cannot be loaded ({reason})", "pip install '.[cuda]' in the clone")
    return None


def _no_sources() -> Obstacle | None:
    if any(sources_dir().glob("*.cu")):
        return None
    return Obstacle(
        f"{sources_dir()} has no kernel sources", "pip install --force-reinstall --no-deps . in the clone"
    )


def _unfit(device: int) -> Obstacle | None:
    name, arch, driver = torch.cuda.get_device_name(device), arch_of(device), _driver_version()
    if torch.cuda.get_device_capability(device) < OLDEST_CAPABILITY:
        why = f"{name} is {arch}, and the kernels need sm_80 or newer"
        return Obstacle(why, "backend='reference', which runs in plain torch")
    if arch not in supported_archs():
        return Obstacle(f"NVRTC {nvrtc_version()} does not know {name}, {arch}", "pip install -U nvidia-cuda-nvrtc")
    if driver < int(nvrtc_version().split(".")[0]):
        # A driver runs what any NVRTC of its own major version made, and nothing of a later one.
        return Obstacle(f"the NVIDIA driver is for CUDA {driver}, NVRTC is {nvrtc_version()}", "update the driver")
    return None


def _driver_version() -> int:
    """The newest major version of CUDA that the driver knows."""
    from cuda.bindings import driver

    _, version = driver.cuDriverGetVersion()
    return int(version) // 1000


@functools.cache
def nvrtc_version() -> str:
    """Of the NVRTC that is loaded, such as "13.0.88"; without the last number where pip did not install it."""
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    for distribution in (f"nvidia-cuda-nvrtc-cu{major}", "nvidia-cuda-nvrtc"):
        try:
            installed = metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
        if installed.startswith(f"{major}.{minor}."):
            return installed
    return f"{major}.{minor}"


@functools.cache
def supported_archs() -> list[str]:
    """The architectures that NVRTC compiles for and the kernels are written for, oldest first."""
    from cuda.bindings import nvrtc

    _, numbers = nvrtc.nvrtcGetSupportedArchs()
    return [f"sm_{number}" for number in numbers if divmod(number, 10) >= OLDEST_CAPABILITY]


def arch_of(device: int) -> str:
    """The architecture of a CUDA device, such as "sm_90"."""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def compile_cubin(spec: KernelSpec, arch: str) -> Cubin:
    """Compile, whatever is in the disk cache.

    Raises:
        KernelCompileError: NVRTC refuses it (the message has its log), the source is not there, or `unavailable()`.
    """
    _require_available()
    from cuda.core import Program, ProgramOptions

    _log.info("compiling %s for %s", spec, arch)
    try:
        folders = [str(sources_dir()), *(str(path.parent) for path in _own_headers(spec))]
        options = ProgramOptions(name=spec.source, arch=SPECIFIC.get(arch, arch), include_path=folders, **OPTIONS)
        code = Program(_text(spec), "c++", options).compile("cubin", name_expressions=(spec.expression,))
    except Exception as error:  # cuda-core has no public name for the class it raises
        log = str(error).strip()
        raise KernelCompileError(f"NVRTC {nvrtc_version()} does not compile {spec} for {arch}: {log}") from error
    return Cubin(bytes(code.code), code.symbol_mapping[spec.expression].decode())


def _require_available(device: int | None = None) -> None:
    reason = unavailable(device)
    if reason is not None:
        raise KernelCompileError(reason)


def _text(spec: KernelSpec) -> str:
    """What is compiled."""
    includes = "".join(f'#include "{header}"\n' for header in spec.headers)
    source = _read(spec, sources_dir() / spec.source).decode()
    return f'{includes}#line 1 "{spec.source}"\n{source}\nstatic_assert({spec.claim});\n'


def _own_headers(spec: KernelSpec) -> list[Path]:
    """Those that are not below `cuda/`."""
    return [Path(header) for header in spec.headers if Path(header).is_absolute()]


def _read(spec: KernelSpec, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise KernelCompileError(f"A source of {spec} cannot be read: {error}") from error


def cached_cubin(spec: KernelSpec, arch: str) -> Cubin:
    """From the disk cache or, if it is not (or no longer whole) there, compiled and put there.

    A cache that cannot be written is logged, once, and otherwise done without.

    Raises:
        KernelCompileError: as `compile_cubin`.
    """
    _require_available()
    directory = cache_directory("kernels")
    if directory is None:
        kernel_files.warn_once("there is no home directory")
        return compile_cubin(spec, arch)
    entry = directory / f"{Path(spec.source).stem}-{arch}-{_key(spec, arch)}{kernel_files.SUFFIX}"
    cubin = kernel_files.read(entry)
    if cubin is None:
        cubin = compile_cubin(spec, arch)
        kernel_files.write(entry, cubin)
    return cubin


def _key(spec: KernelSpec, arch: str) -> str:
    """A hash of everything that decides the result: the kernel, its source, every header, the compiler, the options.

    Read anew each time, which takes a fraction of a millisecond: a source edited under a running process
    must not end up under the key of what it was before.
    """
    headers = sorted(path for path in (sources_dir() / "common").rglob("*") if path.is_file())
    beside = [path for own in _own_headers(spec) for path in sorted(own.parent.glob("*.cuh"))]
    contents = [(path.name, sha256(_read(spec, path)).hex()) for path in (*headers, *_own_headers(spec), *beside)]
    parts = (kernel_files.FORMAT, nvrtc_version(), OPTIONS, arch, spec, sha256(_text(spec).encode()).hex(), contents)
    return sha256(repr(parts).encode()).hex()


def fingerprint() -> str:
    """Twelve digits of a hash of all sources in `cuda/`, but for comments and blanks, and of the Python that picks,
    plans and launches kernels. Measurements that have the same are of the same kernels."""
    sources = sorted(path for path in sources_dir().rglob("*.cu*") if path.is_file())
    texts = [_COMMENT.sub(" ", path.read_text(encoding="utf-8")).split() for path in sources]
    planned = [Path(__file__).with_name(name).read_text(encoding="utf-8") for name in _PLANNED_BY]
    return sha256(repr(([path.name for path in sources], texts, planned)).encode()).hex()[:12]


@functools.cache
def load(spec: KernelSpec, device: int) -> Kernel:
    """The kernel on that CUDA device, ready for `cuda.core.launch`. The current device stays what it was.

    Threads may call this at once: at worst both load the kernel, and one of the two is remembered.

    Raises:
        KernelCompileError: as `compile_cubin`, or the device is unfit.
    """
    _require_available(device)
    from cuda.core import Device, ObjectCode

    cubin = cached_cubin(spec, arch_of(device))
    with torch.cuda.device(device):
        Device(device).set_current()  # torch's own context: the device's primary one
        return ObjectCode.from_cubin(cubin.code, name=str(spec)).get_kernel(cubin.symbol)
