"""Storage that fails for a while: try again, for longer and longer, and then say so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0  # seconds

# How the text of an error of TensorStore, always a ValueError, begins where storage is to blame.
# "os_error_code" is in those of the operating system.
_STORAGE = (
    "UNKNOWN",
    "UNAVAILABLE",
    "PERMISSION_DENIED",
    "RESOURCE_EXHAUSTED",
    "DEADLINE_EXCEEDED",
)


class StorageError(OSError):
    """Storage kept failing for as long as the config allows; the message says what and why."""


def storage_failed(error: BaseException) -> bool:
    """Whether storage is at fault, and not what is stored: it may be better in a while."""
    if isinstance(error, OSError):
        return True
    text = str(error)
    absent = text.startswith("NOT_FOUND")
    return isinstance(error, ValueError) and (
        text.startswith(_STORAGE) or ("os_error_code" in text and not absent)
    )


def with_retries[T](
    action: Callable[[], T],
    what: str,
    *,
    seconds: float,
    passes: Callable[[Exception], bool] = storage_failed,
) -> T:
    """action(), again after each error that `passes` with doubling pauses, for at most `seconds`
    from the first error on.

    what: names the action in warnings and in the StorageError that is raised in the end.
    """
    end, delay, again = None, FIRST_DELAY, ""
    while True:
        try:
            return action()
        except Exception as error:
            if not passes(error):
                raise
            end = time.monotonic() + seconds if end is None else end
            if time.monotonic() + delay > end:
                raise StorageError(f"{what} failed{again}: {describe(error)}") from error
            logging.getLogger(__name__).warning(
                "%s failed, trying again in %.1f s: %s", what, delay, describe(error)
            )
            time.sleep(delay)
            delay, again = min(2 * delay, LONGEST_DELAY), f", and again for {seconds:g} s"


def describe(error: BaseException) -> str:
    """The error in one line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
