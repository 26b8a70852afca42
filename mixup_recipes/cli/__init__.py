"""The console command ``mixup-recipes``: one thin line per command; the work is done where it belongs.

What needs torch is imported within a command, so that help, completion and what is about names answer at once.
"""

import sys

from mixup_recipes import flags
from mixup_recipes.cli import demo, jobs, pages, recipes
from mixup_recipes.cli.base import app
from mixup_recipes.typed import UserError

__all__ = ["app", "demo", "jobs", "main", "pages", "recipes"]

app.register_install_completion_command(help="Let the Tab key complete commands and flags in this shell.")


def main() -> None:
    """Entry point."""
    flags.run(lambda: command(sys.argv[1:]))


def command(argv: list[str]) -> int | None:
    """Run the command that the arguments ask for. A file or folder that the system does not let us use is one line."""
    if argv[:1] and argv[0] in jobs.SCRIPTS and not {"--help", "-h"} & {*argv}:
        return jobs.SCRIPTS[argv[0]](argv[1:])  # its errors are those of the script
    try:
        return flags.asked(app, argv)
    except OSError as e:
        if e.filename is None:  # no file of the user's
            raise
        raise UserError(f"{e.filename}: {e.strerror}") from None
