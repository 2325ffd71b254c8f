"""Safetensors folders, read and written one tensor at a time.

A safetensors file is eight bytes (little endian: the header's length), a JSON header
{name: {dtype, shape, data_offsets}}, and the tensors' bytes. We read and write it ourselves: the
library maps whole files or holds whole shards, and its NumPy side lacks bfloat16.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from llada2_jax.checkpoint import ArraySpec, CheckpointError
from llada2_jax.folders import HF_INDEX as INDEX

SINGLE = "model.safetensors"
DTYPES = {
    "F32": np.dtype(np.float32),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_ITEM_BYTES = {
    **{"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2},
    **{"I16": 2, "U16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1},
}


@dataclasses.dataclass(frozen=True)
class _Entry:
    file: Path
    start: int  # in the file, in bytes
    shape: tuple[int, ...]
    code: str


class TensorFolder:
    """The tensors of a folder: one file, or shards with or without an index.

    Raises: CheckpointError for a file that is absent, truncated or no safetensors file, and for a
    name that two files have. The message names the file or the tensor.
    """

    def __init__(self, folder: Path):
        self.folder = Path(folder)
        self._entries: dict[str, _Entry] = {}
        for file in _files(self.folder):
            for name, entry in _read_header(file).items():
                if name in self._entries:
                    other = self._entries[name].file.name
                    raise CheckpointError(f"{file}: tensor {name} is in {other} too")
                self._entries[name] = entry
        self._check_index()

    @property
    def names(self) -> set[str]:
        return set(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Raises CheckpointError for a dtype that weights do not have here."""
        code = self._entries[name].code
        if code not in DTYPES:
            raise CheckpointError(
                f"tensor {name} has dtype {code}: weights are {', '.join(DTYPES)}; "
                "cast or dequantise the checkpoint first"
            )
        return DTYPES[code]

    def read(self, name: str, lead: int | None = None) -> np.ndarray:
        """A tensor, or its slice [lead], in a buffer of its own."""
        entry, dtype = self._entries[name], self.dtype(name)
        shape = entry.shape if lead is None else entry.shape[1:]
        size = math.prod(shape) * dtype.itemsize
        buffer = np.empty(size, np.uint8)
        # Plain reads rather than a memory map: mapped pages count as the process's memory.
        with open(entry.file, "rb", buffering=0) as stream:
            stream.seek(entry.start + (lead or 0) * size)
            done = 0
            while done < size:  # one read gives at most 2 GiB
                count = stream.readinto(buffer.data[done:])
                if not count:
                    raise CheckpointError(f"{entry.file}: truncated inside tensor {name}")
                done += count
        return buffer.view(dtype).reshape(shape)

    def _check_index(self) -> None:
        if not (self.folder / INDEX).is_file():
            return
        for name, file in _weight_map(self.folder).items():
            if name not in self._entries or self._entries[name].file.name != file:
                raise CheckpointError(f"{self.folder / INDEX}: tensor {name} is not in {file}")


def _weight_map(folder: Path) -> dict[str, str]:
    try:
        weight_map = json.loads((folder / INDEX).read_text())["weight_map"]
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{folder / INDEX}: no usable weight_map: {error!r}") from None
    if not isinstance(weight_map, dict) or not all(map(_is_file_name, weight_map.values())):
        raise CheckpointError(f"{folder / INDEX}: weight_map must name a file for each tensor")
    return weight_map


def _is_file_name(value: Any) -> bool:
    """A file of the folder itself: an index must not make us read elsewhere."""
    return isinstance(value, str) and value not in ("", ".", "..") and not set(value) & {"/", "\0"}


def _files(folder: Path) -> list[Path]:
    if (folder / INDEX).is_file():
        files = [folder / name for name in sorted(set(_weight_map(folder).values()))]
    else:
        files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise CheckpointError(f"{folder}: no *.safetensors file")
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{folder}: {INDEX} names files that are absent: {absent}")
    return files


def _read_header(file: Path) -> dict[str, _Entry]:
    size = file.stat().st_size
    with open(file, "rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CheckpointError(f"{file}: truncated in its header, or no safetensors file")
        try:
            header = json.loads(stream.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{file}: its header is no JSON: not safetensors") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is no JSON object: not safetensors")
    header.pop("__metadata__", None)
    entries = {}
    for name, info in header.items():
        entries[name] = _entry(file, name, info, data_start=8 + length, size=size)
    return entries


def _entry(file: Path, name: str, info: dict[str, Any], *, data_start: int, size: int) -> _Entry:
    try:
        code, shape, (start, end) = info["dtype"], tuple(info["shape"]), info["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{file}: the header's entry of {name} is malformed") from None
    if not (isinstance(code, str) and all(map(_is_size, (*shape, start, end))) and start <= end):
        raise CheckpointError(f"{file}: the header's entry of {name} is malformed")
    if data_start + end > size:
        raise CheckpointError(
            f"{file}: truncated: tensor {name} ends at byte {data_start + end}, the file at {size}"
        )
    if code in _ITEM_BYTES and end - start != math.prod(shape) * _ITEM_BYTES[code]:
        raise CheckpointError(f"{file}: tensor {name}: {end - start} bytes for {code} {shape}")
    return _Entry(file, data_start + start, shape, code)


def _is_size(value: Any) -> bool:
    return type(value) is int and value >= 0


# ---- writing -------------------------------------------------------------------------------------


class TensorFolderWriter:
    """Writes tensors in a given order, in shards of at most `shard_bytes`, with an index.

    One shard is called model.safetensors and has no index, as Hugging Face does it.
    """

    def __init__(self, folder: Path, specs: Mapping[str, ArraySpec], shard_bytes: int):
        self.folder = folder
        self._shards = _plan_shards(specs, shard_bytes)
        self._specs = specs
        self._order = iter([(shard, name) for shard in self._shards for name in shard])
        self._stream: io.BufferedWriter | None = None
        self._current: list[str] | None = None
        folder.mkdir(parents=True, exist_ok=True)

    def write(self, name: str, value: np.ndarray) -> None:
        """Appends a tensor; the calls follow the order of the specs."""
        shard, expected = next(self._order)
        spec = self._specs[name]
        if name != expected or value.shape != spec.shape or value.dtype != spec.dtype:
            raise ValueError(f"wrote {name} {value.dtype}{value.shape}, the plan was {expected}")
        if shard is not self._current:
            self._start(shard)
        assert self._stream is not None
        self._stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)

    def finish(self) -> None:
        """Closes the last shard and writes the index."""
        self.close()
        if len(self._shards) == 1:
            return
        weights = {n: self._file(i) for i, shard in enumerate(self._shards) for n in shard}
        total = sum(spec.nbytes for spec in self._specs.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.flush()
            os.fsync(self._stream.fileno())
            self._stream.close()
        self._stream = None

    def _start(self, shard: list[str]) -> None:
        self.close()
        number = next(i for i, s in enumerate(self._shards) if s is shard)
        self._stream, self._current = open(self.folder / self._file(number), "wb"), shard  # noqa: SIM115
        self._stream.write(_header(shard, self._specs))

    def _file(self, number: int) -> str:
        count = len(self._shards)
        return SINGLE if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def _plan_shards(specs: Mapping[str, ArraySpec], shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    used = 0
    for name, spec in specs.items():
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += spec.nbytes
    return shards


def _header(names: Iterable[str], specs: Mapping[str, ArraySpec]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in names:
        spec = specs[name]
        end = offset + spec.nbytes
        header[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the tensors start on a multiple of eight
    return struct.pack("<Q", len(text)) + text
