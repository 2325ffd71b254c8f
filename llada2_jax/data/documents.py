"""Sources of documents: stable ids, a train/validation split that never moves."""

from __future__ import annotations

import dataclasses
import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from llada2_jax import progress

VALIDATION_PERCENT = 2


@dataclasses.dataclass(frozen=True)
class Document:
    """id: stable, 31 bits, from the name. name: path relative to the source."""

    id: int
    name: str
    text: str


def stable_hash(text: str) -> int:
    """31-bit hash that is the same on every machine and in every process; also of names of files
    that are not UTF-8, as Python has them (PEP 383)."""
    data = text.encode(errors="surrogateescape")
    return int.from_bytes(hashlib.sha256(data).digest()[:4], "big") >> 1


def split_of(name: str) -> str:
    """ "train" or "validation", by the hash of the name alone."""
    return "validation" if stable_hash("split:" + name) % 100 < VALIDATION_PERCENT else "train"


def python_files(root: Path, split: str) -> Iterator[Document]:
    """UTF-8 Python sources below `root` in the order of their paths.

    Installed packages are not the standard library and are left out; so are files that are not
    UTF-8 (a few of the interpreter's own tests are broken on purpose).
    """
    chosen = [
        path for path in sorted(root.rglob("*.py")) if _belongs(path.relative_to(root), split)
    ]
    for path in progress.bar(chosen, f"reading ({split})", unit="file"):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if text.strip():
            name = path.relative_to(root).as_posix()
            yield Document(stable_hash(name), name, text)


def _belongs(path: Path, split: str) -> bool:
    skipped = {"site-packages", "dist-packages", "__pycache__"}
    return not skipped & set(path.parts) and split_of(path.as_posix()) == split


def standard_library(split: str) -> Iterator[Document]:
    """The source of the running interpreter's standard library."""
    return python_files(Path(sysconfig.get_path("stdlib")), split)


def documents(source: str, split: str) -> Iterator[Document]:
    """Documents of a named source: "stdlib", or the path of a folder of Python files.

    Raises: ValueError if the source is neither; FileNotFoundError if it holds no file.
    """
    if source == "stdlib":
        return standard_library(split)
    root = Path(source).expanduser()
    if not root.is_dir():
        raise ValueError(f"data.source={source!r} is neither 'stdlib' nor a folder")
    return python_files(root, split)
