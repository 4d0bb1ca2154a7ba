"""Makes the documentation, a folder of HTML: the README, docs/, the files they lead to, and the API reference.

python .ci/documentation.py [FOLDER]  # default: build/docs

Files keep their places, so a link stays as it is written, but for the ending `.md`. One that leads nowhere is an
error, and so is a warning of pdoc's.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

import api
import pdoc
from markdown_it import MarkdownIt
from markdown_it.token import Token
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import get_lexer_by_name

ROOT = Path(__file__).parents[1]


def main(folder: Path) -> None:
    """Writes all pages, or ends the program with a list of the broken links."""
    listed = [Path("README.md"), *sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md"))]
    listed += [Path(name) for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    pages = gather(listed, ROOT)
    if wrong := list(broken_links(pages, ROOT)):
        sys.exit("\n".join(wrong))
    api.main(folder / "api")
    template = pdoc.render.env.get_template("page.html.jinja2")
    for page in pages.values():
        for path in {link.path for link in page.links} - set(pages):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / path, folder / path)
        out = folder / place(page.path)
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(template.render(page=page, pages=[pages[path] for path in listed]), encoding="utf-8")
    print(f"Written: {folder / 'index.html'}")


def gather(listed: list[Path], root: Path) -> dict[Path, Page]:
    """The pages of a list and all that can be reached from them, by their path from the root."""
    pages: dict[Path, Page] = {}
    waiting = list(listed)
    while waiting:
        path = waiting.pop()
        if path not in pages and path.suffix == ".md" and (root / path).is_file():
            pages[path] = Page(path, (root / path).read_text(encoding="utf-8"))
            waiting += [link.path for link in pages[path].links]
    return pages


def broken_links(pages: dict[Path, Page], root: Path) -> Iterator[str]:
    """A sentence for each."""
    for page in pages.values():
        for link in page.links:
            if link.path.parts[:1] == ("..",) or not (root / link.path).is_file():
                yield f"{page.path}: {link.path} is no file of the repository."
            elif link.heading and (link.path not in pages or link.heading not in pages[link.path].headings):
                yield f"{page.path}: {link.path} has no heading #{link.heading}."


def place(path: Path) -> Path:
    """Where a file of the repository lies in the documentation."""
    if path == Path("README.md"):
        return Path("index.html")
    return path.with_suffix(".html") if path.suffix == ".md" else path


@dataclass(frozen=True)
class Link:
    """Leads to a file, named from the root, and there to a heading, if it is not empty."""

    token: Token
    attribute: str
    path: Path
    heading: str


class Page:
    """A Markdown file.

    Attributes:
        path: from the root.
        headings: their texts by the names that links have for them, which are GitHub's.
        links: those to files of the repository, pictures among them.
    """

    def __init__(self, path: Path, text: str) -> None:
        self.path = path
        self._tokens = _MARKDOWN.parse(text)
        self.headings = dict(_headings(self._tokens))
        self.links = list(self._links())

    @property
    def title(self) -> str:
        return next(iter(self.headings.values()))

    def to(self, path: Path | str) -> str:
        """The link from here to another place in the documentation."""
        return Path(os.path.relpath(path, self.path.parent)).as_posix()

    def to_page(self, other: Page) -> str:
        return self.to(place(other.path))

    def html(self) -> str:
        """The page's text, with links as the documentation has them."""
        for link in self.links:
            link.token.attrs[link.attribute] = self.to(place(link.path)) + (link.heading and f"#{link.heading}")
        return _MARKDOWN.renderer.render(self._tokens, _MARKDOWN.options, {})

    def _links(self) -> Iterator[Link]:
        for token in (child for block in self._tokens for child in block.children or ()):
            attribute = "src" if token.type == "image" else "href"
            url = urlsplit(str(token.attrs.get(attribute, "#")))
            if attribute in token.attrs and not url.scheme:
                path = os.path.normpath(self.path.parent / unquote(url.path)) if url.path else self.path
                yield Link(token, attribute, Path(path), url.fragment)


def _headings(tokens: list[Token]) -> Iterator[tuple[str, str]]:
    """Names the headings and tells their names and texts."""
    seen: dict[str, int] = {}
    for opened, inline in itertools.pairwise(tokens):
        if opened.type == "heading_open":
            text = "".join(child.content for child in inline.children or ())
            name = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
            seen[name] = seen.get(name, -1) + 1
            opened.attrs["id"] = f"{name}-{seen[name]}" if seen[name] else name
            yield opened.attrs["id"], text


def _coloured(code: str, language: str, _: str) -> str:
    inner = highlight(code, get_lexer_by_name(language or "text"), HtmlFormatter(nowrap=True))
    return f'<pre class="pdoc-code codehilite">{inner}</pre>'


_MARKDOWN = MarkdownIt("commonmark", {"highlight": _coloured}).enable("table")

if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/docs"))
