"""Every figure in README.md comes from a committed result file."""

from tools import readme


def test_the_readme_shows_the_committed_figures() -> None:
    assert readme.main(["--check"]) == 0


def test_a_changed_figure_is_noticed() -> None:
    text = readme.README.read_text()
    row = next(line for line in readme.render(text).splitlines() if line.startswith("| 1 x 32k |"))
    assert readme.render(text.replace(row, "| 1 x 32k | 0.00 |")) == text


def test_the_readme_stays_short() -> None:
    assert len(readme.README.read_text().split()) <= 1500
