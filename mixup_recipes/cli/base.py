"""What all commands share: the application, and how their arguments are called and read."""

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from mixup_recipes import __version__, flags
from mixup_recipes.files import check_output, write
from mixup_recipes.typed import from_yaml

app = App(
    name="mixup-recipes",
    help="Train, evaluate and publish mixup recipes, and make tables, plots and pages of what was trained.",
    version=__version__,
    **flags.SETTINGS | {"version_flags": ["--version"]},
)


def group(name: str, about: str) -> App:
    """A command that has commands."""
    app.command(made := App(name=name, help=about, **flags.SETTINGS))
    return made


def whole(_kind: type, tokens: Any) -> int:
    """An integer; cyclopts itself would round."""
    try:
        return int(tokens[0].value)
    except ValueError:
        raise ValueError(f"expected an integer, got {tokens[0].value!r}") from None


def several(_kind: type, tokens: Any) -> list[str]:
    """A list, as ``16 32`` or ``[16, 32]``."""
    words = [token.value for token in tokens]
    if words and words[0].startswith("["):
        words = [str(word) for word in from_yaml(" ".join(words))]
    return words


def listed(words: str, name: str | None = None, metavar: str = "TEXT...") -> Parameter:
    """A flag that takes several values; ``name`` where it is not that of the argument."""
    return Parameter(name=name, consume_multiple=True, negative="", converter=several, metavar=metavar, help=words)


def said(words: str, *names: str) -> Parameter:
    """A flag with its help; ``names`` where it has others than that of the argument."""
    return Parameter(name=names or None, negative=(), help=words)


def text(words: str, *names: str) -> Parameter:
    """A flag whose value is text."""
    return Parameter(name=names or None, metavar="TEXT", help=words)


Whole = Annotated[int, Parameter(converter=whole)]
RunFolder = Annotated[Path, said("Folder of a run.", "--run", "--model")]
Model = Annotated[str, text("Run folder or hf-hub:OWNER/NAME.", "--run", "--model")]
AnyModel = Annotated[str, text("Run folder, timm name or hf-hub:OWNER/NAME.", "--run", "--model")]
Repository = Annotated[str | None, text("Repository on the Hub, NAME or OWNER/NAME.", "--hub_model_id", "--repo_id")]
RecipeName = Annotated[str, text("Recipe name SETTING_MIXER, or the path of a recipe file.", "--recipe", "--name")]
Results = Annotated[Path | None, said("Folder of run records. The default is that of this package.")]
Output = Annotated[Path | None, said("Write to this file instead of printing.")]


@contextlib.contextmanager
def leaving_at_once(half: Path) -> Iterator[None]:
    """SIGTERM and Ctrl-C end the process at once, whatever a library keeps it at; ``half`` is not left behind.

    A thread sees to it: Python runs a signal handler only between two of its own steps.
    """
    listener, told = socket.socketpair()
    told.setblocking(False)
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    fd = signal.set_wakeup_fd(told.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while (numbers := listener.recv(1)) and numbers[0] not in before:
            pass  # a signal that others listen for
        if not numbers:
            return
        try:
            with contextlib.suppress(OSError):  # a folder of this name is none of ours
                half.unlink(missing_ok=True)
            print(f"stopped: {flags.NOTHING_KEPT}", file=sys.stderr, flush=True)
        finally:  # also where nobody reads it
            os._exit(128 + numbers[0])

    waiting = threading.Thread(target=listen, daemon=True)
    waiting.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(fd)
        for number, handler in before.items():
            signal.signal(number, handler)
        told.close()
        waiting.join()
        listener.close()


def put(text: str, out: Path | None) -> None:
    """Print a text, or write it to a file, whole or not at all."""
    if out is None:
        print(text, end="")
    else:
        check_output(out)
        write(out, text)
        print(out)
