"""How a kernel gets onto a GPU: how many CTAs a piece of work is split over, and the launch itself.

The splits depend on shapes alone, never on lengths, which live on the device: a captured launch stays right while
sequences grow.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import KernelError
from sparsekv.ops import compiler, instances
from sparsekv.ops.compiler import KernelSpec

if TYPE_CHECKING:
    from cuda.core import Kernel, LaunchConfig, Stream

WARP = 32
UNIT = 16  # tokens that a warp attends to at a time; also pages that it scores at a time
MAX_SPLITS = 128  # parts that merge_attention puts together
LONG = 1024  # units of a sequence beyond which a second launch is worth an even load
STATIC_SHARED = 12_288  # bytes of shared memory, at most, that a kernel has without asking


@dataclass(frozen=True)
class Gpu:
    """What splitting depends on: SMs, compute capability, and bytes of shared memory that a CTA may ask for."""

    sms: int
    capability: tuple[int, int]
    shared: int = 200_000

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


@dataclass(frozen=True)
class Split:
    """CTAs that share one (sequence, kv head), whether they form a cluster, and the warps of each."""

    ctas: int
    clustered: bool
    warps: int


def max_warps(head_dim: int, group: int) -> int:
    """Warps of a CTA for which the attention kernels have registers."""
    return 16 if head_dim * instances.head_tiles(group) <= 128 else 8


def split_attention(facts: Gpu, rows: int, units: int, warps: int) -> Split:
    """How `rows` (sequence, kv head) pairs with up to `units` of sixteen tokens each are attended to.

    A cluster merges in the same launch. It is placed less freely, so long work is split over lone CTAs and merged in
    a second launch.
    """
    slots = facts.sms * 16 // 8  # CTAs of 8 warps that run at once
    if units >= LONG and slots // rows > 1:
        return Split(min(slots // rows, MAX_SPLITS), False, min(warps, 8))
    wanted = min(-(-units // 8), max(1, slots // rows))
    return Split(min(_power_of_two(wanted), facts.max_cluster), True, min(warps, 8))


def fitted(split: Split, facts: Gpu, shared: Callable[[Split], int]) -> Split:
    """The same split with as many warps as shared memory has room for; `shared` says what a split needs, in bytes."""
    while shared(split) > facts.shared and split.warps > 1:
        split = replace(split, warps=split.warps // 2)
    return split


def split_step(facts: Gpu, rows: int, warps: int, capacity: Callable[[int, int], int]) -> Split:
    """How the fused step splits `rows` (sequence, kv head) pairs: into the largest clusters of which all run at once.

    Args:
        capacity: how many clusters of so many CTAs, of so many warps each, the GPU runs at once. It is not what the
            number of SMs suggests: a cluster lies within one part of the GPU, and the parts differ in size.
    """
    for ctas in range(facts.max_cluster, 0, -1):
        if capacity(ctas, warps) >= rows:
            return Split(ctas, True, warps)
    return Split(1, True, min(warps, 8))


def _power_of_two(number: int) -> int:
    """The largest that is not larger."""
    return 1 << (max(number, 1).bit_length() - 1)


def address(tensor: Tensor | None) -> int:
    """A kernel's pointer argument; null for None."""
    return 0 if tensor is None else tensor.data_ptr()


@functools.lru_cache(4096)
def _int32(number: int) -> np.int32:
    return np.int32(number)


def arguments(*values: Any) -> list[Any]:
    """Kernel arguments in C's types: tensors and None become pointers, ints int and floats float."""
    return [_argument(value) for value in values]


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return address(value)
    if isinstance(value, int):
        return _int32(value)
    return np.float32(value) if isinstance(value, float) else value


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
