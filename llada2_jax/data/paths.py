"""The files that a path stands for: a folder on this machine or in a bucket, a file, a glob."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import logging
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath

from llada2_jax.errors import UserError
from llada2_jax.retry import describe


class SourceError(UserError, ValueError):
    """A source that cannot be read; the message names the file and the way out."""


def require(name: str, extra: str, what: str) -> Any:
    """Imports an optional package. Raises: SourceError naming the extra that brings it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SourceError(
            f"the package {name!r} {what}: pip install 'llada2-jax[{extra}]'"
        ) from error


@contextlib.contextmanager
def bucket_errors(path: str) -> Iterator[None]:
    """What gcsfs raises: as an OSError if it may pass, else as a SourceError."""
    if not path.startswith("gs://"):
        yield
        return
    gcsfs = require("gcsfs.retry", "gcs", "reads gs:// paths")
    logger = logging.getLogger("gcsfs")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs tracebacks of what is told in a line here
    try:
        yield
    except (gcsfs.HttpError, *gcsfs.RETRIABLE_EXCEPTIONS, OSError) as error:
        what = f"{path} cannot be read: {describe(error)}"
        if gcsfs.is_retriable(error):
            raise OSError(what) from error
        if isinstance(error, OSError) and "Forbidden" not in str(error):  # how a 403 comes
            raise
        raise SourceError(f"{what}; check the name and your credentials for the bucket") from error
    finally:
        logger.setLevel(level)


def root_of(path: str) -> epath.Path:
    """The source as a path. Raises: SourceError without the package that reads buckets."""
    if path.startswith("gs://"):
        require("gcsfs", "gcs", "reads gs:// paths")
    return epath.Path(path).expanduser()


def matched(root: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """The files that a path stands for (its own, all below it, or a glob's), and what else is
    there: folders that a glob matches; links to nothing and pipes, which are never opened."""
    if root.is_dir():
        return walk(root)
    if is_file(root):
        return [root], []
    if not any(c in root.name for c in "*?["):
        return [], []
    files, others = [], []
    for path in root.parent.glob(root.name):
        (files if is_file(path) else others).append(path)
    return files, others


def is_file(path: epath.Path) -> bool:
    """Whether a path leads to a file; to epath a pipe is one."""
    return path.is_file() if "://" in str(path) else os.path.isfile(path)


def walk(root: epath.Path) -> tuple[list[epath.Path], list[epath.Path]]:
    """All files below a folder, and what else has a name there and is no folder; epath's walk of a
    bucket names folders without the scheme."""
    if "://" not in str(root):
        return _walk_local(str(root))
    scheme = "".join(str(root).partition("://")[:2])
    files = []
    for folder, _, names in root.walk(on_error=_raise):
        named = epath.Path(scheme + str(folder).removeprefix(scheme))
        files += [named / name for name in names]
    return files, []


def _walk_local(root: str) -> tuple[list[epath.Path], list[epath.Path]]:
    """As walk, also below folders that are linked there. Each folder has one turn, however many
    links lead to it: under its own name if it has one here."""
    seen: set[str] = set()
    own, linked = [root], []
    files, others = [], []
    while own or linked:
        folder = own.pop() if own else linked.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            if _holds(entry.is_dir):
                (linked if entry.is_symlink() else own).append(entry.path)
            else:
                kind = files if _holds(entry.is_file) else others
                kind.append(epath.Path(entry.path))
    return files, others


def _holds(test: Callable[[], bool]) -> bool:
    """test(), of a folder's entry; a link that leads to itself is nothing."""
    try:
        return test()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _raise(error: OSError) -> None:
    raise error


def stamp_of(files: Iterable[epath.Path]) -> str:
    """A hash of when the files were last changed."""
    return hashlib.sha256(repr([_changed(f) for f in files]).encode()).hexdigest()[:16]


def _changed(file: epath.Path) -> int:
    """Nanoseconds; of a bucket seconds, or 0 where it keeps no times."""
    return file.stat().mtime if "://" in str(file) else os.stat(file).st_mtime_ns
