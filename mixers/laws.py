"""The names of sampling laws, ``cutmix@clova-2019``: a number behind a point counts the versions of a law."""

import re


def law_in(text: str) -> str:
    """The law that the docstring of a mixer's file names; empty where it names none."""
    found = re.search(r"^Sampling\slaw: ``([^`]+)``", text, re.M)
    return found[1] if found else ""
