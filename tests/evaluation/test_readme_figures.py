"""Every figure in README.md comes from a committed result file."""

from typing import Any


def test_the_readme_shows_the_committed_figures(readme: Any) -> None:
    assert readme.main(["--check"]) == 0


def test_a_changed_figure_is_noticed(readme: Any) -> None:
    text = readme.README.read_text()
    row = next(line for line in readme.render(text).splitlines() if line.startswith("| dense |"))
    assert readme.render(text.replace(row, "| dense | 9 of 8 |")) == text
