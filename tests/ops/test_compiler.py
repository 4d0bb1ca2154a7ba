"""Compiling kernels with the real NVRTC, which needs no GPU, and keeping them in a disk cache."""

import logging
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from sparsekv.errors import KernelCompileError
from sparsekv.ops import compiler, kernel_files
from sparsekv.ops.compiler import KernelSpec
from sparsekv.ops.kernel_files import Cubin

pytestmark = pytest.mark.skipif(
    compiler._no_compiler() is not None, reason="needs the cuda extra: pip install '.[cuda]'"
)

SOURCE = """
#include "common/scale.cuh"
template <typename T, int N>
__global__ void fill(T* out) { out[threadIdx.x] = T(N) * scale; }
"""
FILL = KernelSpec("fill.cu", "fill<float, 3>")
ARCH = "sm_90"


@pytest.fixture(autouse=True)
def _no_memory_of_other_tests() -> Iterator[None]:
    def forget() -> None:
        for function in (compiler.obstacle, compiler.nvrtc_version, kernel_files.warn_once, compiler.load):
            function.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `cuda/` folder with one kernel that includes one header."""
    folder = tmp_path / "cuda"
    (folder / "common").mkdir(parents=True)
    (folder / "fill.cu").write_text(SOURCE)
    (folder / "common" / "scale.cuh").write_text("constexpr float scale = 2;")
    monkeypatch.setattr(compiler, "sources_dir", lambda: folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSEKV_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache" / "kernels"


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """What NVRTC has compiled so far."""
    compile_cubin, found = compiler.compile_cubin, []

    def counting(spec: KernelSpec, arch: str) -> Cubin:
        found.append(spec)
        return compile_cubin(spec, arch)

    monkeypatch.setattr(compiler, "compile_cubin", counting)
    return found


def entries(cache: Path) -> list[Path]:
    return sorted(cache.iterdir())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_a_template_is_compiled(arch: str, sources: Path) -> None:
    cubin = compiler.compile_cubin(FILL, arch)
    assert cubin.code.startswith(b"\x7fELF")
    assert cubin.symbol == "_Z4fillIfLi3EEvPT_"
    assert cubin.symbol.encode() in cubin.code


def test_the_second_time_it_comes_from_the_cache(sources: Path, cache: Path, compiled: list[KernelSpec]) -> None:
    first = compiler.cached_cubin(FILL, ARCH)
    assert compiler.cached_cubin(FILL, ARCH) == first
    assert compiled == [FILL]
    (entry,) = entries(cache)  # and no temporary file
    assert entry.name.startswith("fill-sm_90-")
    assert kernel_files.cache_usage() == (1, entry.stat().st_size)


def append_to(name: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def edit(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with (sources / name).open("a") as file:
            file.write("\n// edited\n")

    return edit


CHANGES = {
    "source": append_to("fill.cu"),
    "header": append_to("common/scale.cuh"),
    "a new header": lambda sources, _: (sources / "common" / "new.cuh").write_text(""),
    "options": lambda _, monkeypatch: monkeypatch.setitem(compiler.OPTIONS, "std", "c++20"),
    "version": lambda _, monkeypatch: monkeypatch.setattr(compiler, "nvrtc_version", lambda: "13.9.9"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_decides_the_result_is_in_the_key(
    change: str, sources: Path, cache: Path, compiled: list[KernelSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler.cached_cubin(FILL, ARCH)
    CHANGES[change](sources, monkeypatch)
    compiler.cached_cubin(FILL, ARCH)
    assert len(compiled) == len(entries(cache)) == 2


def test_the_fingerprint_is_of_the_code(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = compiler.fingerprint()
    (sources / "fill.cu").write_text(f"// What it fills\n{SOURCE}\n/* two\nlines */")
    assert compiler.fingerprint() == first
    (sources / "common" / "scale.cuh").write_text("constexpr float scale = 3;")
    assert compiler.fingerprint() != first
    (sources / "common" / "scale.cuh").write_text("constexpr float scale = 2;")
    monkeypatch.setattr(compiler, "_PLANNED_BY", ("plans.py",))
    assert compiler.fingerprint() != first


def test_each_kernel_and_architecture_has_its_own_entry(
    sources: Path, cache: Path, compiled: list[KernelSpec]
) -> None:
    other = KernelSpec("fill.cu", "fill<int, 3>")
    cubins = {compiler.cached_cubin(spec, arch) for spec in (FILL, other) for arch in ("sm_80", "sm_90")}
    assert len(cubins) == len(entries(cache)) == len(compiled) == 4


DAMAGE = {
    "truncated": lambda content: content[: len(content) // 2],
    "empty": lambda content: b"",
    "one bit": lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
    "something else": lambda content: b"not a kernel",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_entry_is_replaced(damage: str, sources: Path, cache: Path, compiled: list[KernelSpec]) -> None:
    whole = compiler.cached_cubin(FILL, ARCH)
    (entry,) = entries(cache)
    content = entry.read_bytes()
    entry.write_bytes(DAMAGE[damage](content))
    assert compiler.cached_cubin(FILL, ARCH) == whole
    assert len(compiled) == 2
    assert entry.read_bytes() == content


def test_a_cache_that_cannot_be_written_is_done_without(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").touch()  # nothing can be made below a file, not even by root
    monkeypatch.setenv("SPARSEKV_CACHE_DIR", str(tmp_path / "file" / "cache"))
    for _ in range(2):
        assert compiler.cached_cubin(FILL, ARCH).code
    (record,) = caplog.records  # once
    assert record.levelno == logging.WARNING
    assert str(tmp_path / "file" / "cache") in record.message
    assert kernel_files.cache_usage() == (0, 0)


def test_a_full_disk_leaves_nothing_behind(
    sources: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write_some(path: Path, content: bytes) -> None:
        with path.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_some)
    assert compiler.cached_cubin(FILL, ARCH).code
    assert "No space left" in caplog.text
    assert entries(cache) == []


def test_without_a_home_nothing_is_cached(
    sources: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("SPARSEKV_CACHE_DIR", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # what it does for a user without a home
    monkeypatch.chdir(tmp_path)
    assert compiler.cached_cubin(FILL, ARCH).code
    assert "no home directory" in caplog.text
    assert kernel_files.cache_usage() == (0, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["cuda"]  # and no folder called "~"


PROGRAM = """
import sys
from pathlib import Path
from sparsekv.ops import compiler
compiler.sources_dir = lambda: Path(sys.argv[1])
for n in range(8):
    cubin = compiler.cached_cubin(compiler.KernelSpec("fill.cu", f"fill<float, {n}>"), "sm_90")
    assert cubin.symbol == f"_Z4fillIfLi{n}EEvPT_", cubin.symbol
"""


def test_two_processes_at_once(sources: Path, cache: Path, compiled: list[KernelSpec]) -> None:
    both = [subprocess.Popen([sys.executable, "-c", PROGRAM, sources], stderr=subprocess.PIPE) for _ in range(2)]
    for process in both:
        _, error = process.communicate(timeout=120)
        assert process.returncode == 0, error.decode()
    assert len(entries(cache)) == 8
    for n in range(8):
        compiler.cached_cubin(KernelSpec("fill.cu", f"fill<float, {n}>"), ARCH)
    assert compiled == []


def test_threads_at_once(sources: Path, cache: Path) -> None:
    found: list[Cubin] = []
    threads = [threading.Thread(target=lambda: found.append(compiler.cached_cubin(FILL, ARCH))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(set(found)) == len(entries(cache)) == 1


@pytest.mark.parametrize(
    ("spec", "arch", "said"),
    [
        (KernelSpec("fill.cu", "empty<float>"), ARCH, 'identifier "empty" is undefined'),
        (KernelSpec("broken.cu", "broken<1>"), ARCH, "broken.cu(2): error"),
        (KernelSpec("lost.cu", "lost<1>"), ARCH, "No such file"),
        (FILL, "sm_12345", "sm_12345"),
    ],
)
def test_the_error_has_the_log_and_the_name_of_the_kernel(
    spec: KernelSpec, arch: str, said: str, sources: Path, cache: Path
) -> None:
    (sources / "broken.cu").write_text("template <int N> __global__ void broken() {\n  nonsense;\n}\n")
    for attempt in (compiler.compile_cubin, compiler.cached_cubin):
        with pytest.raises(KernelCompileError) as raised:
            attempt(spec, arch)
        assert said in str(raised.value)
        assert f"{spec.expression} of {spec.source}" in str(raised.value)
    assert kernel_files.cache_usage() == (0, 0)


@pytest.mark.parametrize("module", ["cuda.core", "cuda.bindings", "cuda.bindings.nvrtc"])
def test_without_the_cuda_extra(module: str, sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith(("cuda.core", "cuda.bindings"))]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    reason = compiler.unavailable()
    assert reason is not None
    assert "cannot be loaded" in reason
    assert "pip install '.[cuda]' in the clone" in reason
    for attempt in (compiler.compile_cubin, compiler.cached_cubin):
        with pytest.raises(KernelCompileError, match=r"pip install '\.\[cuda\]' in the clone"):
            attempt(FILL, ARCH)


def test_without_nvrtc_itself(sources: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def not_found() -> str:
        raise RuntimeError("libnvrtc.so is not there\nand was looked for in many places")

    monkeypatch.setattr(compiler, "nvrtc_version", not_found)
    assert compiler.unavailable() == (
        "cuda-core or its NVRTC cannot be loaded (libnvrtc.so is not there). "
        "Remedy: pip install '.[cuda]' in the clone."
    )


def test_without_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiler, "sources_dir", lambda: tmp_path)
    assert "has no kernel sources" in str(compiler.unavailable())


def test_the_sources_are_found_here() -> None:
    assert (compiler.sources_dir() / "README.md").is_file()


def gpu(monkeypatch: pytest.MonkeyPatch, name: str, capability: tuple[int, int], driver: int = 13) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(compiler, "_driver_version", lambda: driver)


@pytest.mark.parametrize(("capability", "arch"), [((8, 0), "sm_80"), ((8, 9), "sm_89"), ((12, 0), "sm_120")])
def test_a_gpu_that_fits(
    capability: tuple[int, int], arch: str, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, "NVIDIA Something", capability)
    assert compiler.arch_of(0) == arch
    assert compiler.unavailable(0) is None


@pytest.mark.parametrize(
    ("capability", "driver", "why"),
    [
        ((7, 5), 13, "NVIDIA Something is sm_75, and the kernels need sm_80 or newer"),
        ((99, 0), 13, "does not know NVIDIA Something, sm_990"),
        ((9, 0), 12, "the NVIDIA driver is for CUDA 12, NVRTC is 13"),
    ],
)
def test_a_gpu_that_does_not(
    capability: tuple[int, int], driver: int, why: str, sources: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu(monkeypatch, "NVIDIA Something", capability, driver)
    assert why in str(compiler.unavailable(0))
    assert compiler.unavailable() is None  # kernels can still be compiled, for other machines
    with pytest.raises(KernelCompileError, match="Remedy"):
        compiler.load(FILL, 0)


def test_importing_does_not_load_cuda_core() -> None:
    program = "import sys, sparsekv.ops.compiler; sys.exit('cuda.core' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], timeout=120).returncode == 0


@pytest.mark.gpu
def test_a_loaded_kernel_runs(sources: Path, cache: Path) -> None:
    from cuda.core import LaunchConfig, Stream, launch

    specs = [KernelSpec("fill.cu", f"fill<float, {n}>") for n in range(4)]
    out = torch.zeros(4, 32, device="cuda")
    stream = Stream.from_handle(torch.cuda.current_stream().cuda_stream)
    for row, spec in zip(out, specs, strict=True):
        kernel = compiler.load(spec, 0)
        assert compiler.load(spec, 0) is kernel
        launch(stream, LaunchConfig(grid=1, block=32), kernel, row.data_ptr())
    assert len(entries(cache)) == 4
    assert out.cpu().equal(torch.tensor([0.0, 2.0, 4.0, 6.0])[:, None].expand(4, 32))


@pytest.mark.gpu
def test_loading_leaves_the_current_device_alone(sources: Path, cache: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    torch.cuda.set_device(0)
    assert compiler.load(FILL, 1)
    assert torch.cuda.current_device() == 0
