"""How a kernel gets onto a GPU: what the GPU can do, arguments as C lays them out, and the launch itself.

The launch is the driver's, as cuda-core's own takes no structs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import struct
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from sparsekv.errors import KernelError
from sparsekv.ops import compiler
from sparsekv.ops.compiler import KernelSpec

if TYPE_CHECKING:
    from cuda.bindings.driver import CUlaunchAttribute, CUlaunchConfig
    from cuda.core import Kernel

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


def packed(args: Sequence[Any]) -> bytes:
    """Kernel arguments one behind the other, as C lays them out, whether the kernel takes them one by one or as the
    members of one struct: tensors and None are pointers, ints `int`, numpy's int64 `long long`, floats `float`."""
    values = [x.data_ptr() if isinstance(x, Tensor) else 0 if x is None else x for x in args]
    return struct.pack("@" + "".join(map(_format, args)), *values)


def _format(arg: Any) -> str:
    if arg is None or isinstance(arg, Tensor):
        return "P"
    return "q" if isinstance(arg, np.int64) else "f" if isinstance(arg, float) else "i"


def readable(tokens: Tensor) -> Tensor:
    """Tokens whose channels lie together, each at a multiple of 16 bytes."""
    aligned = tokens.data_ptr() % 16 == 0 and all(stride % 8 == 0 for stride in tokens.stride()[:-1])
    return tokens if tokens.stride(-1) == 1 and aligned else tokens.contiguous()


def launch(
    spec: KernelSpec,
    like: Tensor,
    grid: tuple[int, int, int],
    warps: int,
    args: Sequence[Any],
    shared: int = 0,
    cluster: int = 1,
    maps: bytes = b"",
) -> None:
    """Launches on the current stream of a tensor's device; grid in CTAs, shared memory in bytes, `args` for `packed`,
    and before them a struct of tensor maps, if the kernel takes one.

    Raises:
        KernelError: CUDA refuses the launch.
        KernelCompileError: the kernel cannot be built.
    """
    from cuda.bindings import driver

    device, values = like.device.index, packed(args)
    kernel = _ready(spec, device)
    # Room for the padding that a struct may end in.
    buffer, size = ctypes.create_string_buffer(values, len(values) + 4), ctypes.c_size_t(len(values))
    # CU_LAUNCH_PARAM_BUFFER_POINTER, _BUFFER_SIZE and _END, each but the last followed by what it names.
    extra = (ctypes.c_void_p * 5)(1, ctypes.addressof(buffer), 2, ctypes.addressof(size), 0)
    given = (0, ctypes.addressof(extra))
    if maps:  # the compiler aligns them in a way that only the driver knows, so it gets each struct apart
        first = ctypes.create_string_buffer(maps, len(maps))
        each = (ctypes.c_void_p * 2)(ctypes.addressof(first), ctypes.addressof(buffer))
        given = (ctypes.addressof(each), 0)
    with _current(device):
        stream = torch.cuda.current_stream(device).cuda_stream
        config = _config(grid, cluster, warps, shared, stream, gpu(device).capability >= (9, 0))
        function = driver.CUfunction(int(kernel.handle))
        (status,) = driver.cuLaunchKernelEx(config, function, *given)
    if status != driver.CUresult.CUDA_SUCCESS:
        size_of = f"grid {grid}, clusters of {cluster}, {warps} warps, {shared} bytes of shared memory"
        raise KernelError(f"{spec} cannot be launched ({size_of}): {status.name}")


@functools.cache
def capacity(spec: KernelSpec, device: int, cluster: int, warps: int, shared: int) -> int:
    """How many clusters of a kernel the device runs at once."""
    from cuda.bindings import driver

    with _current(device):
        config = _config((cluster, 1, 1), cluster, warps, shared, 0, True)
        status, count = driver.cuOccupancyMaxActiveClusters(
            driver.CUfunction(int(_ready(spec, device).handle)), config
        )
    if status != driver.CUresult.CUDA_SUCCESS:
        raise KernelError(f"{spec}: no clusters of {cluster} CTAs with {warps} warps: {status.name}")
    return int(count)


@functools.lru_cache(1024)
def _config(
    grid: tuple[int, int, int], cluster: int, warps: int, shared: int, stream: int, modern: bool
) -> CUlaunchConfig:
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = warps * WARP, 1, 1
    config.sharedMemBytes, config.hStream = shared, driver.CUstream(stream)
    config.attrs = _attributes(cluster) if modern else []
    config.numAttrs = len(config.attrs)
    return config


def _attributes(cluster: int) -> list[CUlaunchAttribute]:
    from cuda.bindings import driver

    clustered, early = driver.CUlaunchAttribute(), driver.CUlaunchAttribute()
    clustered.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    size = clustered.value.clusterDim
    size.x, size.y, size.z = cluster, 1, 1
    # A kernel may be set up while the one before ends: ours wait for its results by themselves.
    early.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    early.value.programmaticStreamSerializationAllowed = 1
    return [clustered, early]


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
