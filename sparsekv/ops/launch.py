"""How a kernel gets onto a GPU: what the GPU can do, arguments in C's types, and the launch itself."""

from __future__ import annotations

import contextlib
import functools
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import KernelError
from sparsekv.ops import compiler
from sparsekv.ops.compiler import KernelSpec

if TYPE_CHECKING:
    from cuda.core import Kernel, LaunchConfig, Stream

WARP = 32
STATIC_SHARED = 12_288  # bytes of shared memory, at most, that a kernel has without asking


@dataclass(frozen=True)
class Gpu:
    """What splitting depends on: SMs, compute capability, and bytes of shared memory that a CTA may ask for."""

    sms: int
    capability: tuple[int, int]
    shared: int

    @property
    def max_cluster(self) -> int:
        """CTAs of a cluster; above 8 only where data-centre GPUs allow it."""
        if self.capability < (9, 0):
            return 1
        return 16 if self.capability[0] in (9, 10) else 8


@functools.cache
def gpu(device: int) -> Gpu:
    """The facts of a device."""
    properties: Any = torch.cuda.get_device_properties(device)
    shared = properties.shared_memory_per_block_optin - STATIC_SHARED
    return Gpu(properties.multi_processor_count, (properties.major, properties.minor), shared)


@functools.cache
def usable(device: int) -> bool:
    """Whether kernels run on a device; warns once if not."""
    obstacle = compiler.unavailable(device)
    if obstacle is not None:
        warnings.warn(f"sparsekv's kernels cannot run, plain torch does their work, slowly: {obstacle}", stacklevel=2)
    return obstacle is None


@functools.lru_cache(4096)
def _int32(number: int) -> np.int32:
    return np.int32(number)


def arguments(*values: Any) -> list[Any]:
    """Kernel arguments in C's types: tensors and None become pointers, ints int and floats float."""
    return [_argument(value) for value in values]


def _argument(value: Any) -> Any:
    if value is None:
        return 0
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, int):
        return _int32(value)
    return np.float32(value) if isinstance(value, float) else value


def readable(tokens: Tensor) -> Tensor:
    """Tokens whose channels lie together, each at a multiple of 16 bytes."""
    aligned = tokens.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tokens.stride()[:-1])
    return tokens if tokens.stride(-1) == 1 and aligned else tokens.contiguous()


def launch(
    spec: KernelSpec,
    like: Tensor,
    grid: tuple[int, int, int],
    warps: int,
    args: list[Any],
    shared: int = 0,
    cluster: int = 1,
) -> None:
    """Launches on the current stream of a tensor's device; grid in CTAs, shared memory in bytes.

    Raises:
        KernelError: CUDA refuses the launch.
        KernelCompileError: the kernel cannot be built.
    """
    from cuda.core import launch as launch_kernel

    device = like.device.index
    kernel = _ready(spec, device)
    config = _config(grid, cluster, warps, shared, gpu(device).capability >= (9, 0))
    with _current(device):
        stream = _stream(torch.cuda.current_stream(device).cuda_stream)
        try:
            launch_kernel(stream, config, kernel, *args)
        except Exception as error:
            message = (
                f"{spec} cannot be launched (grid {grid}, {warps} warps, {shared} bytes of shared memory): {error}"
            )
            raise KernelError(message) from error


@functools.cache
def capacity(spec: KernelSpec, device: int, cluster: int, warps: int, shared: int) -> int:
    """How many clusters of a kernel the device runs at once."""
    stream = _stream(torch.cuda.default_stream(device).cuda_stream)
    with _current(device):
        config = _config((cluster, 1, 1), cluster, warps, shared, True)
        return _ready(spec, device).occupancy.max_active_clusters(config, stream=stream)


@functools.lru_cache(1024)
def _config(grid: tuple[int, int, int], cluster: int, warps: int, shared: int, modern: bool) -> LaunchConfig:
    from cuda.core import LaunchConfig

    clusters = {"grid": (grid[0] // cluster, *grid[1:]), "cluster": (cluster, 1, 1)} if modern else {"grid": grid}
    # A kernel may be set up while the one before ends: ours wait for its results by themselves.
    return LaunchConfig(block=warps * WARP, shmem_size=shared, programmatic_stream_serialization=modern, **clusters)


@functools.lru_cache(256)
def _stream(handle: int) -> Stream:
    from cuda.core import Stream

    return Stream.from_handle(handle)


_seen = threading.local()


def _current(device: int) -> contextlib.AbstractContextManager[Any]:
    """Makes a device the current one for a launch."""
    if not hasattr(_seen, "thread"):  # a thread in which torch has done nothing on a GPU yet has no CUDA context
        from cuda.core import Device

        Device(torch.cuda.current_device()).set_current()
        _seen.thread = True
    return contextlib.nullcontext() if torch.cuda.current_device() == device else torch.cuda.device(device)


@functools.cache
def _ready(spec: KernelSpec, device: int) -> Kernel:
    """The kernel, allowed all the shared memory there is and the largest clusters."""
    from cuda.bindings import driver

    kernel = compiler.load(spec, device)
    properties: Any = torch.cuda.get_device_properties(device)
    attribute = driver.CUfunction_attribute
    most = properties.shared_memory_per_block_optin - kernel.attributes[device].shared_size_bytes
    wanted = {attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: most}
    if gpu(device).max_cluster > 8:
        wanted[attribute.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED] = 1
    for name, value in wanted.items():
        (status,) = driver.cuKernelSetAttribute(
            name, value, driver.CUkernel(int(kernel.handle)), driver.CUdevice(device)
        )
        if status != driver.CUresult.CUDA_SUCCESS:
            raise KernelError(f"{spec}: {name.name} = {value} is refused ({status.name}).")
    return kernel
