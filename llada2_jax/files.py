"""Small files that a crash at any moment leaves readable; how many files may be open."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path


def temporary_of(path: Path) -> Path:
    """Where a file is written before it takes its name: in the same folder."""
    return path.with_name(f".{path.name}.tmp")


def replace_text(path: Path, text: str) -> None:
    """Writes a file that is there whole, and on disk, or as it was."""
    temporary = temporary_of(path)
    with temporary.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def sync(path: Path) -> None:
    """Through to the disk: what is written next must not be there without it after a power loss."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def append_line(path: Path, line: str) -> None:
    """Adds a line, on disk when this returns; one that a crash cut off before it stays by itself,
    and does not swallow it."""
    with path.open("a+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 1, 0))
        torn = file.read(1) not in (b"", b"\n")
        file.write(b"\n" * torn + line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


ENOUGH_FILES = 1 << 16


def open_files_limit() -> int:
    """How many files this process may have open at a time."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return ENOUGH_FILES if soft == resource.RLIM_INFINITY else soft


def raise_open_files_limit() -> None:
    """To what the system allows this process and those it starts, or enough."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(ValueError, OSError):  # some systems allow less than they say
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
