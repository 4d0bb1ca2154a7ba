"""`sparsekv doctor`: what is installed, which devices there are, what runs where, and how to get what is missing.

`report()` gathers and returns plain data (it is what `--json` prints); `render()` turns that into something to read.
`compile_kernels()` fills the disk cache ahead of use, for GPUs that need not be there.
"""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Console, Group, RenderableType
from rich.progress import track
from rich.table import Table
from rich.text import Text

from sparsekv.errors import ConfigError, KernelCompileError, UnknownNameError
from sparsekv.ops import compiler, instances, kernel_files, schema
from sparsekv.user_cache import cache_directory

DEVICE_KINDS = ("cpu", "cuda")

# Distributions, in the order shown. None of the second row is needed to run.
REQUIRED = ("sparsekv", "torch", "transformers", "tokenizers", "safetensors", "numpy", "einops")
OPTIONAL = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "flashinfer-python")

Report = dict[str, Any]


def report() -> Report:
    """Everything `sparsekv doctor` knows, as plain data that goes into JSON.

    Returns:
        `versions` (name -> version, None if not installed), `devices` (one dict each), `ops` (device kind -> op ->
        "kernel" or "reference"), `kernels` (what compiles them, where they are kept) and `missing` (dicts with
        `what`, `why` and `remedy`).
    """
    devices = [_cpu(), *_gpus()]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in REQUIRED + OPTIONAL},
        "devices": devices,
        "ops": {kind: _implementations(kind) for kind in DEVICE_KINDS},
        "kernels": _kernels(),
        "missing": _missing(devices),
    }


def compile_kernels(archs: list[str] | None, jobs: int, formats: Sequence[str] = ("plain",)) -> Report:
    """Compile every kernel that is promised for pages of these formats, for these architectures or for the GPUs
    present, into the disk cache.

    Threads do: NVRTC compiles without holding Python's lock. A progress bar goes to stderr.

    Returns:
        `archs`, `kernels` (how many, over all of these), `seconds` and `failed` (dicts of `kernel`, `arch`, `error`).
    Raises:
        ConfigError: no architecture is named and there is no GPU, or one is named that NVRTC does not know.
        UnknownNameError: there is no such format.
        KernelCompileError: nothing can be compiled here.
    """
    archs = _archs(archs)
    specs = instances.promised(formats)
    start = time.perf_counter()
    pool = ThreadPoolExecutor(jobs)
    try:
        futures = [pool.submit(_compile_error, spec, arch) for arch in archs for spec in specs]
        done = track(as_completed(futures), "Compiling", len(futures), console=Console(stderr=True), transient=True)
        failed = [failure for failure in (future.result() for future in done) if failure]
    finally:
        pool.shutdown(cancel_futures=True)  # an interrupt need not wait for all that is queued
    return {
        "archs": archs,
        "kernels": len(futures),
        "seconds": round(time.perf_counter() - start, 1),
        "failed": sorted(failed, key=lambda failure: (failure["kernel"], failure["arch"])),
    }


def render(report: Report) -> RenderableType:
    """The report as text for a terminal."""
    versions = _table("versions")
    for name, version in report["versions"].items():
        versions.add_row(name, version or Text("not installed", style="dim"))

    devices = _table("devices")
    for device in report["devices"]:
        devices.add_row(_label(device), _describe(device))

    ops = _table("what runs where")
    ops.add_row("", *report["ops"])
    for op in next(iter(report["ops"].values())):
        ops.add_row(op, *(implementations[op] for implementations in report["ops"].values()))

    missing = _table("missing")
    for problem in report["missing"]:
        # Text: in a plain string rich would take the brackets of '.[cuda]' for markup.
        missing.add_row(
            Text(problem["what"], style="bold red"), Text(problem["why"]), Text(f"-> {problem['remedy']}")
        )
    if not report["missing"]:
        missing.add_row(Text("nothing", style="green"))
    parts: list[RenderableType] = [versions, devices, ops, _render_kernels(report["kernels"]), missing]
    if "compile" in report:
        parts.append(_render_compile(report["compile"]))
    return Group(*(piece for part in parts for piece in (part, "")))


def _render_kernels(kernels: Report) -> Table:
    table = _table("kernels")
    table.add_row("state", Text(kernels["state"]))
    table.add_row("NVRTC", kernels["nvrtc"] or Text("not found", style="dim"))
    for label, state in kernels["gpus"].items():
        table.add_row(label, Text(state))
    cache = kernels["cache"]
    size = f"{cache['entries']} kernels, {cache['bytes'] / 2**20:.1f} MiB"
    table.add_row("cache", Text(f"{cache['directory'] or 'none, as there is no home directory'}: {size}"))
    return table


def _render_compile(result: Report) -> Text:
    """No table: NVRTC's log keeps its lines."""
    failed = len(result["failed"])
    done = f"{result['kernels'] - failed} of {result['kernels']} kernels for {', '.join(result['archs'])}"
    text = Text.assemble(("compiled", "bold italic"), f"\n{done} in {result['seconds']} s\n")
    for failure in result["failed"]:
        text.append(f"\n{failure['kernel']}, {failure['arch']}\n", style="bold red").append(failure["error"] + "\n")
    return text


def _table(title: str) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    return table


def _label(device: Report) -> str:
    return device["kind"] if device["kind"] == "cpu" else f"{device['kind']}:{device['index']}"


def _describe(device: Report) -> str:
    if device["kind"] == "cpu":
        return f"{device['name']}, {device['cores']} cores, {device['threads']} torch threads"
    return f"{device['name']}, {device['memory_gib']} GiB, compute capability {device['compute_capability']}"


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> Report:
    return {"kind": "cpu", "name": _cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[Report]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "kind": "cuda",
                "index": index,
                "name": properties.name,
                "memory_gib": round(properties.total_memory / 2**30),
                "compute_capability": f"{properties.major}.{properties.minor}",
            }
        )
    return found


def _implementations(kind: str) -> dict[str, str]:
    """What the dispatcher would run on this kind of device: a kernel of its own, or the reference."""
    # The dispatcher has no public way to ask this; the private one is what torch's own tests use.
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    return {
        op: "kernel" if has_kernel(f"{schema.NAMESPACE}::{op}", kind.upper()) else "reference"
        for op in schema.SCHEMAS
    }


def _kernels() -> Report:
    """What compiles kernels, whether it can, and where they are kept."""
    entries, size = kernel_files.cache_usage()
    directory = cache_directory("kernels")
    return {
        "state": compiler.unavailable() or "available",
        "nvrtc": compiler.nvrtc_version() if compiler.obstacle() is None else None,
        "gpus": {f"cuda:{index}": _kernels_on(index) for index in range(torch.cuda.device_count())},
        "cache": {"directory": str(directory) if directory else None, "entries": entries, "bytes": size},
    }


def _kernels_on(index: int) -> str:
    return compiler.unavailable(index) or compiler.arch_of(index)


def _archs(asked: list[str] | None) -> list[str]:
    """The architectures to compile for, each once."""
    reason = compiler.unavailable()
    if reason is not None:
        raise KernelCompileError(reason)
    for arch in asked or ():
        if arch not in compiler.supported_archs():
            raise UnknownNameError("--arch", arch, compiler.supported_archs())
    here = (index for index in range(torch.cuda.device_count()) if compiler.obstacle(index) is None)
    archs = list(dict.fromkeys(asked or map(compiler.arch_of, here)))
    if not archs:
        raise ConfigError("No GPU here runs the kernels: name what to compile for, as in --arch sm_80 sm_90 sm_100.")
    return archs


def _compile_error(spec: compiler.KernelSpec, arch: str) -> dict[str, str] | None:
    """Put the kernel into the disk cache; what went wrong, if anything did."""
    try:
        compiler.cached_cubin(spec, arch)
    except KernelCompileError as error:
        return {"kernel": str(spec), "arch": arch, "error": str(error)}
    return None


def _missing(devices: list[Report]) -> list[dict[str, str]]:
    gpus = [device for device in devices if device["kind"] == "cuda"]
    return _unmet_requirements() + (_missing_kernels(gpus) if gpus else _unused_gpu())


def _missing_kernels(gpus: list[Report]) -> list[dict[str, str]]:
    """Why GPUs run the reference in plain torch, each reason once."""
    found = dict.fromkeys(filter(None, (compiler.obstacle(gpu["index"]) for gpu in gpus)))
    return [{"what": "the CUDA kernels", **obstacle._asdict()} for obstacle in found]


def _unmet_requirements() -> list[dict[str, str]]:
    """What the package's own metadata asks for, extras aside, and the installation does not meet."""
    problems = []
    for requirement in map(Requirement, metadata.requires("sparsekv") or ()):
        installed = _version(requirement.name)
        met = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        if met or not _applies(requirement):
            continue
        what = f"{requirement.name}{requirement.specifier}"
        why = f"{installed} is installed" if installed else "not installed"
        problems.append({"what": what, "why": why, "remedy": f"pip install '{what}'"})
    return problems


def _applies(requirement: Requirement) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": ""})


def _unused_gpu() -> list[dict[str, str]]:
    """An NVIDIA driver that torch does not get to see: the usual reason for 'why is it on the CPU?'."""
    if shutil.which("nvidia-smi") is None:
        return []
    if torch.version.cuda is None:
        why, remedy = f"torch {torch.__version__} is a build without CUDA", "pip install --force-reinstall torch"
    else:
        why = f"torch is built for CUDA {torch.version.cuda} but sees no GPU"
        remedy = "check with nvidia-smi that the driver works and supports that CUDA version"
    return [{"what": "a GPU that torch can use", "why": why, "remedy": remedy}]
