"""Storage that fails for a while: try again, for longer and longer, and then say so."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

FIRST_DELAY, LONGEST_DELAY = 0.1, 10.0  # seconds


class StorageError(OSError):
    """Storage kept failing for as long as the config allows; the message says what and why."""


def with_retries[T](
    action: Callable[[], T],
    what: str,
    *,
    seconds: float,
    errors: tuple[type[BaseException], ...] = (OSError,),
) -> T:
    """action(), again after each of `errors` with doubling pauses, for at most `seconds`.

    what: names the action in warnings and in the StorageError that is raised in the end.
    """
    end, delay = time.monotonic() + seconds, FIRST_DELAY
    while True:
        try:
            return action()
        except errors as error:
            if time.monotonic() + delay > end:
                raise StorageError(
                    f"{what} failed, and again for {seconds:g} s: {describe(error)}"
                ) from error
            logging.getLogger(__name__).warning(
                "%s failed, trying again in %.1f s: %s", what, delay, describe(error)
            )
            time.sleep(delay)
            delay = min(2 * delay, LONGEST_DELAY)


def describe(error: BaseException) -> str:
    """The error in one line."""
    return " ".join((str(error) or type(error).__name__).split())[:300]
