"""Build the site: ``python -m website build/site``. A warning of Sphinx or a link that leads nowhere is an error."""

import shutil
import sys
from pathlib import Path

from sphinx.cmd.build import main as sphinx

from website import links, pages


def build(out: Path) -> int:
    """Build the site into a folder, which is made anew; the exit status."""
    work = out.parent / f"{out.name}-sources"
    pages.stage(work)
    shutil.rmtree(out, ignore_errors=True)
    settings = ["-c", str(Path(__file__).parent), "-d", str(out.parent / f"{out.name}-doctrees")]
    if status := sphinx(["-b", "html", "-E", "-q", "-W", "--keep-going", *settings, str(work), str(out)]):
        return status
    dead, others = links.check(out)
    for link in dead:
        print(f"leads nowhere: {link}", file=sys.stderr)
    listed = out.parent / f"{out.name}-links.txt"
    listed.write_text("".join(f"{link}\n" for link in others), encoding="utf-8")
    print(f"{out / 'index.html'}; {listed} has the {len(others)} links to other hosts, which were not checked")
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(build(Path(sys.argv[1] if len(sys.argv) > 1 else "build/site")))
