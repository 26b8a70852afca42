"""Text and tables for Markdown. What a run or data set calls itself is shown as text: no markup of it works."""

import json
import re
from typing import Any

MARKUP = re.compile(r"[\\`*\[\]<>#|~&$]|:(?=//)|(?<!\w)_|_(?!\w)")
PLAIN = re.compile(r"[\w ,.:;/@+=()%^'\"{}\[\]-]+", re.ASCII)


def line(text: object, most: int = 200) -> str:
    """Text in one line of printable characters, shortened where it is very long."""
    shown = " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())
    return shown if len(shown) <= most else f"{shown[:most]}..."


def prose(text: object) -> str:
    """Text that a file holds, as text: what could be markup or a link becomes HTML entities."""
    return MARKUP.sub(lambda found: f"&#{ord(found[0])};", line(text))


def code(text: object) -> str:
    """Text that a file holds, as code where a code span can hold it, also in a table."""
    return f"`{line(text)}`" if PLAIN.fullmatch(line(text)) else prose(text)


def markdown_table(head: list[str], rows: list[list[str]], right: int = 99, left: int = 99) -> str:
    """A Markdown table; columns from ``right`` on are numbers, those from ``left`` on are text again."""
    rule = ["---:" if right <= i < left else "---" for i in range(len(head))]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rows))


def fence(language: str, text: str) -> str:
    """A block of code."""
    return f"```{language}\n{text}\n```"


def shown(value: Any) -> str:
    """A recipe value as it is shown: as a command line would take it."""
    if isinstance(value, tuple | list):
        return " ".join(map(shown, value))
    return json.dumps(value) if isinstance(value, dict | bool) else "none" if value is None else str(value)


def escaped(text: str) -> str:
    """Text for a cell of a Markdown table."""
    return text.replace("|", "\\|").replace("<", "&lt;")
