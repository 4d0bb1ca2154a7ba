"""Every figure in README.md comes from a committed result file."""

from tools import readme


def test_the_readme_shows_the_committed_figures() -> None:
    assert readme.main(["--check"]) == 0


def test_a_changed_figure_is_noticed() -> None:
    text = readme.README.read_text()
    row = next(line for line in readme.render(text).splitlines() if line.startswith("| dense |"))
    assert readme.render(text.replace(row, "| dense | 9 of 8 |")) == text
