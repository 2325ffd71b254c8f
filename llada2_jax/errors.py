"""Errors that a user can put right, and the exit status that a command ends with."""

from __future__ import annotations

import sys
from collections.abc import Callable

EXIT_STATUS = """\
Exit status: 0; 1 where what was asked for cannot be done, with the reason; 2 where the command line
itself is wrong.
"""


class UserError(Exception):
    """Something that is not as it has to be; the message names it and the way out.

    A command that raises it (or OSError) ends with this message and status 1.
    """


class UsageError(UserError):
    """Options that do not go together, or a value that none of them takes: status 2."""


def exit_status(command: str, run: Callable[[], int | None]) -> int:
    """What a command ends with; a mistake of its user is one line on stderr, not a traceback."""
    try:
        return run() or 0
    except (UserError, OSError) as error:
        print(f"{command}: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
