"""Whether the links of a built site lead somewhere: pages, files and the places within pages. Needs no network."""

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Page(HTMLParser):
    """The links of a page, and the places that a link can lead to."""

    def __init__(self, text: str):
        super().__init__()
        self.links: list[str] = []
        self.places: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take down what a tag links to, and its name."""
        given = {name: value for name, value in attrs if value}
        self.places |= {given[name] for name in ("id", "name") if name in given}
        if tag != "link":  # of the head: what a browser loads on its own account
            self.links += [given[name] for name in ("href", "src") if name in given]


def check(site: Path) -> tuple[list[str], list[str]]:
    """Links that lead nowhere, as ``"page: link"``, and the addresses of other hosts, sorted."""
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    dead, others = [], set()
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                others |= {link} if parts.scheme in ("http", "https") or not parts.scheme else set()
                continue
            there = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            known = pages.get(there)
            place = unquote(parts.fragment)
            if not there.is_file() or (place and known is not None and place not in known.places):
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead, sorted(others)
