"""`sparsekv doctor`: what is installed, which devices there are, what runs where, and how to get what is missing.

`report()` gathers and returns plain data (it is what `--json` prints); `render()` turns that into something to read.
"""

from __future__ import annotations

import os
import platform
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from packaging.requirements import Requirement
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sparsekv.ops import schema

DEVICE_KINDS = ("cpu", "cuda")

# Distributions, in the order shown. None of the second row is needed to run.
REQUIRED = ("sparsekv", "torch", "transformers", "tokenizers", "safetensors", "numpy", "einops")
OPTIONAL = ("cuda-core", "cuda-bindings", "nvidia-cuda-nvrtc", "nvidia-cuda-runtime", "flashinfer-python")

Report = dict[str, Any]


def report() -> Report:
    """Everything `sparsekv doctor` knows, as plain data that goes into JSON.

    Returns:
        `versions` (name -> version, None if not installed), `devices` (one dict each), `ops` (device kind -> op ->
        "kernel" or "reference") and `missing` (dicts with `what`, `why` and `remedy`).
    """
    devices = [_cpu(), *_gpus()]
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in REQUIRED + OPTIONAL},
        "devices": devices,
        "ops": {kind: _implementations(kind) for kind in DEVICE_KINDS},
        "missing": _missing(devices),
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
        missing.add_row(Text(problem["what"], style="bold red"), problem["why"], f"-> {problem['remedy']}")
    if not report["missing"]:
        missing.add_row(Text("nothing", style="green"))
    return Group(*(part for table in (versions, devices, ops, missing) for part in (table, "")))


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


def _missing(devices: list[Report]) -> list[dict[str, str]]:
    if not any(device["kind"] == "cuda" for device in devices):
        return _unmet_requirements() + _unused_gpu()
    return _unmet_requirements("cuda" if _kernel_sources() else "")


def _unmet_requirements(extra: str = "") -> list[dict[str, str]]:
    """What the package's own metadata asks for, with or without an extra, and the installation does not meet."""
    problems = []
    for requirement in map(Requirement, metadata.requires("sparsekv") or ()):
        installed = _version(requirement.name)
        met = installed is not None and requirement.specifier.contains(installed, prereleases=True)
        if met or not _applies(requirement, extra):
            continue
        what = f"{requirement.name}{requirement.specifier}"
        always = _applies(requirement, extra="")
        problems.append(
            {
                "what": what,
                "why": f"{installed} is installed" if installed else "not installed",
                "remedy": f"pip install '{what}'" if always else f"pip install 'sparsekv[{extra}]'",
            }
        )
    return problems


def _applies(requirement: Requirement, extra: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


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


def _kernel_sources() -> list[Path]:
    """The CUDA sources: inside the package when installed, beside it in a checkout."""
    package = Path(__file__).parent
    return sorted(path for folder in (package / "cuda", package.parent / "cuda") for path in folder.rglob("*.cu"))
