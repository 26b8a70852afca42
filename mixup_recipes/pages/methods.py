"""What the mixers' files say of their methods: the parts of their docstrings as Markdown, and the papers as BibTeX."""

import inspect
import re
import sys
from pathlib import Path
from typing import Any, NamedTuple

import mixers  # its classes load torch when they are asked for, which the docstrings alone need not
from mixers import BLOCKS, MIXERS, REGRESSION, build
from mixup_recipes.mixer_args import named

# A part of a docstring begins with its name: "Sampling law: ...". The first paragraph is the title.
LABEL = re.compile(r"([A-Z][a-z]+(?: [a-z]+){0,3}):\s")
AUTHORS = re.compile(r"[A-Z][\w'-]+(, [A-Z][\w'-]+)*(,? et al)?")
URL = re.compile(r"https://[^\s,]+")
SPECIAL = re.compile(r"([\\*_\[\]<>|~#$])")
KINDS = {
    "input": "the images",
    "feature": "a hidden feature",
    "learned": "by a mask that is learned",
    "label": "the labels or the loss",
}
"""What a method itself changes, by the words of its ``Kind:``; ``none`` is the word of one that changes nothing."""
METHODS = MIXERS | REGRESSION
"""What is listed and has a page."""
KIND = re.compile(rf"(?:none|({'|'.join(KINDS)})(, ({'|'.join(KINDS)}))*)(; teacher)?\.")


class Method(NamedTuple):
    """One method that a mixer is made of."""

    title: str
    head: str
    """The paragraphs that say what it is and where it was published."""
    parts: dict[str, str]
    """Formula, Published defaults, Sampling law, Cost, Deviations, ... as Markdown, in the order of the docstring."""


def methods(name: str, args: dict[str, Any]) -> list[Method]:
    """What a mixer is made of: its own file first, then those of the mixers inside it.

    Of a mixer of a package that is not installed here only the name is known.
    """
    if any(part not in METHODS | BLOCKS for part in named(name, args)):
        return [Method(name, "", {})]
    parts = [type(part).__module__ for part in build(name, **args).modules() if isinstance(part, mixers.Mixer)]
    modules = dict.fromkeys([METHODS[name].__module__, *parts])
    modules.pop(mixers.Switch.__module__, None)  # what holds mixers together is no method
    found = [parse(inspect.getdoc(sys.modules.get(module)) or "") for module in modules]
    # A paper that trains with others' methods and defines none of its own (deit, rsb) goes by its name; so does a mixer
    # of a script that Python has forgotten (runpy) or that says nothing of itself.
    own = vars(sys.modules.get(METHODS[name].__module__, object)).values()
    if not any(inspect.isclass(v) and v.__module__ == METHODS[name].__module__ for v in own):
        found[0] = found[0]._replace(title=name)
    return found


def parse(doc: str) -> Method:
    """The parts of a docstring."""
    first, *rest = doc.split("\n\n")
    head, label = [first], ""
    parts: dict[str, str] = {}
    for paragraph in rest:
        if found := LABEL.match(paragraph):
            label, paragraph = found[1], paragraph[found.end() :]
        if label:
            parts[label] = f"{parts[label]}\n\n{paragraph}" if label in parts else paragraph
        else:
            head.append(paragraph)
    title = re.split(r"\.\s|:\s", first)[0].rstrip(".")
    return Method(title, "\n\n".join(head), {k: markdown(v) for k, v in parts.items()})


def markdown(text: str) -> str:
    """A docstring as Markdown: what stands outside ``code`` is plain text, but for the bullets of a list."""
    pieces = re.split(r"(``.+?``)", text, flags=re.S)
    pieces = [p if p.startswith("``") else SPECIAL.sub(r"\\\1", p) for p in pieces]
    return re.sub(r"^\\\* ", "* ", "".join(pieces), flags=re.M)


def sentence(text: str) -> str:
    """A part of a docstring as a paragraph of its own; a symbol at its start keeps its case."""
    return text if re.match(r"\w+ ?[\\=~(]|(?!a (?!and ))\w\b", text) else text[:1].upper() + text[1:]


def introduction(method: Method) -> str:
    """What a method is and where it was published, as Markdown with its links."""
    pieces = re.split(r"(https://[^\s,]*[^\s,.);])", method.head)
    return "".join(f"<{piece}>" if i % 2 else markdown(piece) for i, piece in enumerate(pieces))


def kinds(method: Method) -> tuple[list[str], bool]:
    """What a method changes, in words of ``KINDS``, and whether it needs a teacher; of a stranger's, what is said."""
    found, _, more = method.parts.get("Kind", "").rstrip(".").partition(";")
    return [word for word in found.split(", ") if word in KINDS], more.strip() == "teacher"


def year(method: Method) -> str:
    """The year in which it was published; empty where its file names none."""
    found = re.search(r"\b(?:19|20)\d\d\b", re.sub(URL, "", method.head))
    return found[0] if found else ""


def own() -> list[str]:
    """The methods whose files are of this package: others were registered by packages of strangers."""
    folder = Path(mixers.__file__).parent
    files = {name: row.partition(":")[0] for name, row in METHODS.rows.items() if isinstance(row, str)}
    return [name for name, file in files.items() if (folder / f"{file}.py").is_file()]


def bibtex(head: str) -> str | None:
    """The paper that a docstring's head names, ``Title. Authors. Venue year. URL``; None where it names none.

    The name of the method may stand before the title, as in ``HMix. Title. Authors. Venue year. URL``.
    """
    title, *others = re.split(r"\.\s+", " ".join(head.split()))
    if len(others) > 2 and not (AUTHORS.fullmatch(others[0]) or re.search(r"\b(?:19|20)\d\d\b", others[0])):
        title, *others = others
    authors = next((s for s in others[:2] if AUTHORS.fullmatch(s)), None)
    venue = next((m for s in others[:2] if (m := re.match(r"(.{0,60}?)\b((?:19|20)\d\d)\b", s))), None)
    url = URL.search(head)
    if authors and venue and url:
        return entry(title, authors, venue[1].strip(), venue[2], url[0].rstrip("."))
    return None


def entry(title: str, authors: str, venue: str, year: str, url: str) -> str:
    """One BibTeX entry. ``authors``: family names, separated by commas, perhaps with et al."""
    names = re.split(r",? (?=et al)|, ", authors)
    key = re.sub(r"\W", "", f"{names[0]}{year}{re.split(r'[ :]', title)[0]}".lower())
    fields = {"title": f"{{{title}}}", "author": " and ".join("others" if n == "et al" else n for n in names)}
    fields |= {"booktitle": venue} if venue else {}
    fields |= {"year": year, "url": url}
    rows = ",\n".join(f"  {k} = {{{v}}}" for k, v in fields.items())
    return f"@{'inproceedings' if venue else 'misc'}{{{key},\n{rows}\n}}"
