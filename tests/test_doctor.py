import json
import shutil
from importlib import metadata
from io import StringIO
from pathlib import Path

import pytest
import torch
from rich.console import Console

from sparsekv import doctor
from sparsekv.cli import main
from sparsekv.ops import compiler, instances, kernel_files, schema
from sparsekv.ops.compiler import KernelSpec, Obstacle
from sparsekv.user_cache import cache_directory

needs_nvrtc = pytest.mark.skipif(
    compiler._no_compiler() is not None, reason="needs the cuda extra: pip install '.[cuda]' in the clone"
)
GOOD, BAD = KernelSpec("good.cu", "good<1>"), KernelSpec("bad.cu", "bad<1>")


@pytest.fixture
def promised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """A package that promises these kernels, of which GOOD compiles and BAD does not, and an empty cache."""
    (tmp_path / "good.cu").write_text("template <int N> __global__ void good() {}")
    (tmp_path / "bad.cu").write_text("template <int N> __global__ void bad() { nonsense[tag]; }")
    specs = [GOOD]
    monkeypatch.setattr(instances, "promised", lambda formats: specs)
    monkeypatch.setattr(compiler, "sources_dir", lambda: tmp_path)
    monkeypatch.setenv("SPARSEKV_CACHE_DIR", str(tmp_path / "cache"))
    return specs


def rendered(report: doctor.Report) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(doctor.render(report))
    return console.file.getvalue()


def test_report_is_plain_data() -> None:
    report = doctor.report()
    assert json.loads(json.dumps(report)) == report


def test_report_names_versions_and_devices() -> None:
    report = doctor.report()
    assert report["versions"]["sparsekv"] == metadata.version("sparsekv")
    assert report["versions"]["torch"] == metadata.version("torch")
    assert report["devices"][0]["kind"] == "cpu"
    assert report["devices"][0]["name"]
    assert sum(device["kind"] == "cuda" for device in report["devices"]) == torch.cuda.device_count()


def test_what_runs_where_is_read_from_the_dispatcher() -> None:
    kernels = torch.library.Library(schema.NAMESPACE, "IMPL")
    assert doctor.report()["ops"]["cpu"] == dict.fromkeys(schema.SCHEMAS, "reference")
    kernels.impl("score_pages", lambda *args: None, "CPU")
    try:
        assert doctor.report()["ops"]["cpu"] == dict.fromkeys(schema.SCHEMAS, "reference") | {"score_pages": "kernel"}
    finally:
        kernels._destroy()  # or every later test would score with it
    assert doctor.report()["ops"]["cpu"]["score_pages"] == "reference"


def test_nothing_is_missing_here() -> None:
    assert doctor.report()["missing"] == []


def test_what_is_missing_comes_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    installed = {"transformers": "4.40.0"}
    monkeypatch.setattr(doctor.metadata, "version", lambda name: installed.get(name) or version(name))
    (problem,) = doctor.report()["missing"]
    assert problem["what"].startswith("transformers>=")
    assert problem["why"] == "4.40.0 is installed"
    assert problem["remedy"].startswith("pip install 'transformers>=")
    assert problem["remedy"] in rendered(doctor.report())


def test_a_package_that_is_not_installed_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["no-such-package>=1.0; python_version >= '3'"])
    (problem,) = doctor.report()["missing"]
    assert (problem["what"], problem["why"]) == ("no-such-package>=1.0", "not installed")


def test_an_extra_is_not_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["no-such-package>=1.0; extra == 'cuda'"])
    assert doctor.report()["missing"] == []


def test_a_gpu_without_kernels_is_told_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    two = [
        {"kind": "cuda", "index": index, "name": "GPU", "memory_gib": 1, "compute_capability": "9.0"}
        for index in (0, 1)
    ]
    obstacle = Obstacle("cuda-core is not there", "pip install '.[cuda]'")
    monkeypatch.setattr(doctor, "_gpus", lambda: two)
    monkeypatch.setattr(compiler, "obstacle", lambda device=None: obstacle)
    report = doctor.report()
    assert report["missing"] == [{"what": "the CUDA kernels", **obstacle._asdict()}]  # once, not for each GPU
    assert report["kernels"]["state"] == "cuda-core is not there. Remedy: pip install '.[cuda]'."
    assert "-> pip install '.[cuda]'" in rendered(report)


@pytest.mark.parametrize(
    ("cuda", "why"), [(None, "a build without CUDA"), ("13.0", "is built for CUDA 13.0 but sees no GPU")]
)
def test_a_gpu_that_torch_does_not_see(cuda: str | None, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    (problem,) = doctor.report()["missing"]
    assert why in problem["why"]


def test_rendered_report_says_it_all() -> None:
    text = rendered(doctor.report())
    for word in ("transformers", "not installed", "cpu", "cuda", "attend_pages", "reference", "NVRTC", "nothing"):
        assert word in text


@needs_nvrtc
@pytest.mark.parametrize("json_option", [[], ["--json"]], ids=["tables", "json"])
def test_compile_fills_the_cache(
    json_option: list[str], promised: list[KernelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--compile", "--arch", "sm_80", "sm_90", "sm_80", *json_option]) == 0
    assert kernel_files.cache_usage()[0] == 2
    printed = capsys.readouterr().out
    if not json_option:
        assert "2 of 2 kernels for sm_80, sm_90" in printed
        return
    report = json.loads(printed)
    assert report["compile"].pop("seconds") >= 0
    assert report["compile"] == {"archs": ["sm_80", "sm_90"], "kernels": 2, "failed": []}
    assert report["kernels"]["cache"]["entries"] == 2
    assert report["kernels"]["cache"]["directory"] == str(cache_directory("kernels"))


@needs_nvrtc
def test_compile_names_what_fails_and_does_the_rest(
    promised: list[KernelSpec], capsys: pytest.CaptureFixture[str]
) -> None:
    promised.insert(0, BAD)
    assert main(["doctor", "--compile", "--arch", "sm_90", "--jobs", "1"]) == 1
    printed = capsys.readouterr().out
    assert "1 of 2 kernels for sm_90" in printed
    assert "bad<1> of bad.cu, sm_90" in printed
    assert "nonsense[tag];" in printed  # the log, and none of it taken for markup
    assert main(["doctor", "--compile", "--arch", "sm_90", "--json"]) == 1
    (failure,) = json.loads(capsys.readouterr().out)["compile"]["failed"]
    assert (failure["kernel"], failure["arch"]) == (str(BAD), "sm_90")
    assert 'identifier "nonsense" is undefined' in failure["error"]


@needs_nvrtc
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--compile", "--arch", "sm_9"], "Did you mean 'sm_90'"),
        (["--compile", "--arch", "sm_75"], "Known: sm_100"),
        (["--compile"], "name what to compile for"),
        (["--arch", "sm_90"], "--arch goes with --compile"),
    ],
)
def test_compile_says_what_is_wrong(
    options: list[str],
    message: str,
    promised: list[KernelSpec],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert main(["doctor", *options]) == (2 if "sm_" in message else 1)
    assert message in capsys.readouterr().err


def test_compile_without_a_compiler(
    promised: list[KernelSpec], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiler, "obstacle", lambda device=None: Obstacle("no NVRTC", "pip install it"))
    assert main(["doctor", "--compile", "--arch", "sm_90"]) == 1
    assert "no NVRTC. Remedy: pip install it." in capsys.readouterr().err


@pytest.mark.gpu
def test_compile_is_for_the_gpus_present(promised: list[KernelSpec]) -> None:
    assert doctor.compile_kernels(None, jobs=1)["archs"] == [compiler.arch_of(0)]


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    gpu = next(device for device in doctor.report()["devices"] if device["kind"] == "cuda")
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["memory_gib"] > 0
    assert f"compute capability {gpu['compute_capability']}" in rendered(doctor.report())
