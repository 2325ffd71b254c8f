"""Who may write a folder: one process and the workers that it starts, none of them longer than it
lives."""

from __future__ import annotations

import errno
import fcntl
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.reduction
import os
import threading
import time
from pathlib import Path

from llada2_jax.errors import UserError

LOCK = ".lock"
WAIT_SECONDS = 5.0  # for workers of a run that was killed, which end at once


class LockedError(UserError, RuntimeError):
    """Another process writes the folder."""


class FolderLock:
    """A folder that this process alone writes, until it leaves the context or ends; and so for each
    process that the lock was sent to when it was started (by `spawn`)."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_) -> None:
        os.close(self._descriptor)

    def __reduce__(self):
        return _received, (multiprocessing.reduction.DupFd(self._descriptor),)


def _received(sent) -> FolderLock:
    return FolderLock(sent.detach())


def lock_folder(folder: Path) -> FolderLock:
    """Takes a folder's lock. Where the file system has no locks, that is a warning.

    Raises: LockedError if another process has it; OSError.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except PermissionError:  # another user's, in a shared folder
        descriptor = os.open(folder / LOCK, os.O_RDONLY)
    try:
        _take(descriptor, folder)
    except BaseException:
        os.close(descriptor)
        raise
    return FolderLock(descriptor)


def _take(descriptor: int, folder: Path) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while True:
        try:
            return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                raise LockedError(
                    f"{folder} is being written by another process, which holds its {LOCK}: wait "
                    "for its end, or choose another folder"
                ) from None
            time.sleep(0.1)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return logging.getLogger(__name__).warning(
                "%s cannot be locked (%s): two processes that write it would not be noticed",
                *(folder, error.strerror),
            )


def end_with_parent() -> None:
    """Ends this process when the one that started it ends, however that came about."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "this process was not started by multiprocessing"

    def watch():
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
