"""Prepared folders as documents with random access."""

from __future__ import annotations

import bisect
import io
import itertools
import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from llada2_jax.data.examples import decode_record
from llada2_jax.data.prepare import FORMAT_VERSION, INDEX, MANIFEST, PLAN, SPLITS, TOKENIZER
from llada2_jax.data.shards import Shard, close_all
from llada2_jax.data.sources import SourceSpec, Unit, place, system_call_failed
from llada2_jax.errors import UserError
from llada2_jax.retry import storage_failed, with_retries

# ArrayRecord has one exception for damage and for a system call that failed, which its text names.
_ABSENT = (FileNotFoundError, NotADirectoryError)
_AGAIN = "prepare it again (--overwrite)"


class PreparedError(UserError, ValueError):
    """A folder that is not prepared data, or that does not fit the run."""


def prepared_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer that a prepared folder was made with. Raises: PreparedError."""
    path = Path(folder) / TOKENIZER / "tokenizer.json"
    try:
        return Tokenizer.from_str(path.read_text(encoding="utf-8"))
    except Exception as error:  # tokenizers raises Exception itself
        raise PreparedError(f"{path} cannot be read: {error}; prepare it again") from None


def read_manifest(folder: str | Path, retry_seconds: float = 60.0) -> dict[str, Any]:
    """The manifest of a prepared folder.

    Args:
      retry_seconds: for how long a read that storage refuses is tried again.

    Raises: PreparedError, StorageError.
    """
    path = Path(folder) / MANIFEST
    try:
        manifest = json.loads(_patiently(path.read_text, f"reading {path}", retry_seconds))
    except _ABSENT:
        unfinished = (path.parent / PLAN).exists()
        why = "its preparation was stopped: run it again" if unfinished else "it was not prepared"
        raise PreparedError(f"{folder} has no {MANIFEST}: {why} (llada2 data prepare)") from None
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PreparedError(f"{path} is not JSON: {error}") from None
    version = manifest.get("version") if isinstance(manifest, dict) else None
    if version != FORMAT_VERSION:
        raise PreparedError(
            f"{path}: version {version!r}, this program reads {FORMAT_VERSION}: {_AGAIN}"
        )
    try:
        _check(manifest)
    except (KeyError, TypeError, AttributeError) as error:
        raise PreparedError(f"{path} is damaged: {type(error).__name__}: {error}") from None
    return manifest


def _patiently[T](read: Callable[[], T], what: str, seconds: float) -> T:
    """read(), again and again where storage fails. A file that is not there is no such failure."""

    def passes(error: Exception) -> bool:
        return storage_failed(error) and not isinstance(error, _ABSENT)

    return with_retries(read, what, seconds=seconds, passes=passes)


def _check(manifest: dict[str, Any]) -> None:
    """Raises KeyError or TypeError for what a reader would stumble over."""
    for value in (manifest["token_bytes"], manifest["chunk_tokens"]):
        if type(value) is not int or not 0 < value < 2**31:
            raise TypeError(f"{value!r} is no size")
    if manifest["token_bytes"] not in (2, 4):
        raise TypeError(f"tokens of {manifest['token_bytes']} bytes")
    manifest["tokenizer"]["sha256"].lower()
    manifest["encode"]["content"].lower()
    for split in SPLITS:
        total = manifest["splits"][split]
        shards = [shard[split] for shard in manifest["shards"]]
        if {type(shard["crc32"]) for shard in shards} - {int}:
            raise TypeError("a shard has no checksum")
        if sum(shard["records"] for shard in shards) != total["records"]:
            raise TypeError(f"the shards' records do not sum to {total['records']!r}")
        bool(total["weighted"])
        total["sha256"].lower()


class PreparedDocuments:
    """Tokenized documents of a split; nothing but the index (28 bytes a document) is in memory.

    ids: int32 [docs]. lengths: int64 [docs], tokens of each. chosen: int64 [docs], see
    examples.Example. first_supervised, supervised_end: int64 [docs]. retry_seconds: for how long a
    read that storage refuses is tried again.

    Raises: PreparedError for a folder that is not what its manifest says; StorageError.
    """

    def __init__(self, folder: str | Path, split: str, retry_seconds: float = 60.0):
        self.folder, self.split, self._retry_seconds = Path(folder), split, retry_seconds
        self.manifest = read_manifest(folder, retry_seconds)
        self._dtype = np.dtype(f"<u{self.manifest['token_bytes']}")
        self._chunk = int(self.manifest["chunk_tokens"])
        shards = [shard[split] for shard in self.manifest["shards"]]
        self._records = [shard["records"] for shard in shards]
        parts = [self._index(i, shard["crc32"]) for i, shard in enumerate(shards)]
        index = np.concatenate(parts) if parts else np.zeros(0, INDEX)
        self._unit_ends = np.cumsum([len(p) for p in parts])
        self._rows = index["row"]
        self.ids = index["id"]
        self.lengths = index["tokens"].astype(np.int64)
        self.chosen = index["chosen"].astype(np.int64)
        self.first_supervised = index["first_supervised"].astype(np.int64)
        self.supervised_end = index["supervised_end"].astype(np.int64)
        chunks = np.where(self.chosen > 0, 1, -(-self.lengths // self._chunk))
        self._first_record = np.cumsum(chunks) - chunks
        if chunks.sum() != sum(self._records):
            raise PreparedError(
                f"{folder}: the index announces {chunks.sum()} records, the manifest "
                f"{sum(self._records)}: {_AGAIN}"
            )
        self._shards = [
            Shard(self.folder / f"{i:05d}.{split}.array_record", n)
            for i, n in enumerate(self._records)
        ]
        self._record_ends = list(itertools.accumulate(self._records))
        for path in (shard.path for shard in self._shards if shard.records):
            if not _patiently(path.is_file, f"looking for {path}", retry_seconds):
                raise PreparedError(f"{path} is missing: {_AGAIN}")

    def _index(self, number: int, checksum: int) -> np.ndarray:
        path = self.folder / f"{number:05d}.{self.split}.npy"
        try:
            data = _patiently(path.read_bytes, f"reading {path}", self._retry_seconds)
        except _ABSENT:
            raise PreparedError(f"{path} is missing: {_AGAIN}") from None
        if zlib.crc32(data) != checksum:
            raise PreparedError(f"{path} is damaged, its checksum is not the manifest's: {_AGAIN}")
        return np.load(io.BytesIO(data), allow_pickle=False)

    @property
    def digest(self) -> str:
        return self.manifest["splits"][self.split]["sha256"]

    @property
    def paired(self) -> bool:
        return self.manifest["encode"]["content"] == "preference"

    @property
    def weighted(self) -> bool:
        """Whether some token has a loss weight other than 0 and 1."""
        return bool(self.manifest["splits"][self.split]["weighted"])

    def read(self, document: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens (int32) and loss weights (fp32) of [start, stop) of a document.

        Raises: PreparedError for a record that is not what the index says; StorageError.
        """
        base, length = int(self._first_record[document]), int(self.lengths[document])
        if self.chosen[document]:
            tokens, weights = self._record(base, length)
            return tokens[start:stop], weights[start:stop]
        parts = []
        for chunk in range(start // self._chunk, -(-stop // self._chunk)):
            size = min(length - chunk * self._chunk, self._chunk)
            tokens, weights = self._record(base + chunk, size)
            part = slice(max(start - chunk * self._chunk, 0), stop - chunk * self._chunk)
            parts.append((tokens[part], weights[part]))
        if len(parts) == 1:
            return parts[0]
        return np.concatenate([t for t, _ in parts]), np.concatenate([w for _, w in parts])

    def _record(self, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        what = f"reading record {number} of the {self.split} split of {self.folder}"
        return with_retries(lambda: self._decode(number, size), what, seconds=self._retry_seconds)

    def _decode(self, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        shard = bisect.bisect_right(self._record_ends, number)
        within = number - (self._record_ends[shard] - self._records[shard])
        try:
            tokens, weights = decode_record(self._shards[shard].read(within), self._dtype)
            if len(tokens) != size:
                raise ValueError(f"it has {len(tokens)} tokens, the index says {size}")
            return tokens, weights
        except (ValueError, RuntimeError, IndexError) as error:
            if system_call_failed(error):
                close_all()
                raise OSError(str(error)) from error
            raise PreparedError(
                f"{self.folder}: record {number} of the {self.split} split is damaged: {error}"
            ) from None

    def place(self, document: int) -> str:
        """Where in the source a document comes from: file and line."""
        plan = json.loads((self.folder / PLAN).read_text())
        unit = int(np.searchsorted(self._unit_ends, document, side="right"))
        fields = plan["units"][unit]
        fields["files"] = tuple(fields["files"])
        spec = SourceSpec(**plan["job"]["source"])
        return place(spec, Unit(**fields), int(self._rows[document]))
