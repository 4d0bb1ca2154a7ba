import json
import shutil
from importlib import metadata
from io import StringIO

import pytest
import torch
from rich.console import Console

from sparsekv import doctor
from sparsekv.ops import schema


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


def test_extras_are_missing_only_where_they_are_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: ["no-such-package>=1.0; extra == 'cuda'"])
    assert doctor._unmet_requirements() == []
    assert doctor._unmet_requirements("eval") == []
    (problem,) = doctor._unmet_requirements("cuda")
    assert problem["remedy"] == "pip install 'sparsekv[cuda]'"


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
    for word in ("transformers", "not installed", "cpu", "cuda", "attend_pages", "reference", "nothing"):
        assert word in text


@pytest.mark.gpu
def test_gpu_is_described() -> None:
    gpu = next(device for device in doctor.report()["devices"] if device["kind"] == "cuda")
    assert gpu["name"] == torch.cuda.get_device_name(0)
    assert gpu["memory_gib"] > 0
    assert f"compute capability {gpu['compute_capability']}" in rendered(doctor.report())
