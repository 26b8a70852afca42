"""The names of sampling laws, such as ``cutmix@clova-2019``. A number behind a point counts the versions of a law."""

import re


def law_in(text: str) -> str:
    """Return the law that the docstring of a mixer's file names. It is empty if the file names none."""
    found = re.search(r"^Sampling\slaw: ``([^`]+)``", text, re.M)
    return found[1] if found else ""
