"""The pages and the API reference are one site, in which every link leads somewhere."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def documentation(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("pdoc", reason="needs pdoc, which the dev extra brings")
    monkeypatch.syspath_prepend(ROOT / ".ci")
    return importlib.import_module("documentation")


def test_the_documentation_is_made_without_a_warning(documentation: ModuleType, tmp_path: Path) -> None:
    documentation.main(tmp_path)
    start, page, api = (tmp_path / name for name in ("index.html", "docs/speed.html", "api/sparsekv.html"))
    assert '<a href="docs/speed.html">Speed</a>' in start.read_text(encoding="utf-8")
    assert '<a href="../index.html">sparsekv</a>' in page.read_text(encoding="utf-8")
    assert "budget" in api.read_text(encoding="utf-8")
    assert (tmp_path / "evaluation/results/demo.png").exists()


def test_links_that_lead_nowhere_are_named(documentation: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "a.md").write_text("# A\n## One `step`, twice\n[up](../README.md) [it](#a) ![no](no.png)")
    (tmp_path / "README.md").write_text(
        "# Top\n[right](docs/a.md#one-step-twice) [wrong](docs/a.md#two) [out](https://a.org/x.md) [up](../b.md)"
    )
    pages = documentation.gather([Path("README.md")], tmp_path)
    assert list(pages) == [Path("README.md"), Path("docs/a.md")]
    assert list(documentation.broken_links(pages, tmp_path)) == [
        "README.md: docs/a.md has no heading #two.",
        "README.md: ../b.md is no file of the repository.",
        "docs/a.md: docs/no.png is no file of the repository.",
    ]
    assert 'href="docs/a.html#one-step-twice"' in pages[Path("README.md")].html()
