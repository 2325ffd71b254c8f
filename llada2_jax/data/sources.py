"""Raw rows from files: which pieces of work a source falls into, and the rows of each piece.

A piece (`Unit`) depends on the files alone, never on how many processes share the work. Its rows
come in order, as dicts; a row that cannot be read is yielded as the BadRow that says why, and a
blank line as None: it is no row, but its number counts.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import gzip
import importlib
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

from etils import epath

from llada2_jax.data.examples import BadRow
from llada2_jax.data.paths import (
    SourceError,
    bucket_errors,
    is_file,
    matched,
    require,
    root_of,
    stamp_of,
    walk,
)
from llada2_jax.retry import describe

UNIT_BYTES = 32 << 20
UNIT_ROWS = 8192

Row = dict[str, Any] | BadRow | None


class _Damaged(Exception):
    """Bytes that are not what their format asks for; storage gave them without an error."""


@dataclasses.dataclass(frozen=True)
class Unit:
    """path: file (or folder) the rows are from. name: the same relative to the source, so that it
    stays when the source is moved. start, stop: which part of it, in what the format counts (bytes,
    records, row groups). size: bytes, or whatever tells how much work it is. files: names below
    path, for formats of many small files. stamp: differs where one of the files was changed, as far
    as their file system tells."""

    path: str
    name: str
    start: int
    stop: int
    size: int
    files: tuple[str, ...] = ()
    stamp: str = ""

    def row_name(self, row: int) -> str:
        """A name for row number `row` that no other row of the source has."""
        return self.files[row] if self.files else f"{self.name}:{self.start}:{row}"


@dataclasses.dataclass(frozen=True)
class SourceSpec:
    """path: file, folder or glob, local or gs://; seqio: "module:task". format: a name of FORMATS,
    or "auto". pattern: names taken from a folder; empty: what the format usually has. records:
    what an ArrayRecord holds, "json" or "text". split: of a `datasets` DatasetDict or a seqio
    task."""

    path: str
    format: str = "auto"
    pattern: str = ""
    records: str = "json"
    split: str = "train"


class Format(Protocol):
    """How files of one kind are cut into units, read, and a row's place told to people. before: how
    many rows, blank lines too, its file has before the unit; None: not known."""

    patterns: tuple[str, ...]

    def plan(self, spec: SourceSpec) -> list[Unit]: ...

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]: ...

    def place(self, unit: Unit, row: int, before: int | None) -> str: ...


def resolve_format(spec: SourceSpec) -> SourceSpec:
    """The spec with its format known. Raises: SourceError, OSError."""
    if spec.format in FORMATS:
        return spec
    if spec.format != "auto":
        raise SourceError(f"format {spec.format!r}: choose one of auto, {', '.join(FORMATS)}")
    with bucket_errors(spec.path):
        path = root_of(spec.path)
        if (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            return dataclasses.replace(spec, format="huggingface")
        found: dict[str, str] = {}
        for file in list_files(spec)[0]:
            found.setdefault(_format_of(file.name), str(file))
        # Of a whole folder, files of no known format are left out; here they were asked for.
        asked_for = bool(spec.pattern) or not path.is_dir()
    unknown = found.pop("", None)
    if len(found) > 1:
        examples = ", ".join(f"{kind} ({file})" for kind, file in found.items())
        raise SourceError(
            f"{spec.path} holds files of several formats: {examples}; say which to read (--format)"
        )
    if unknown and asked_for:
        raise SourceError(
            f"{unknown}: no format has files of such names: say what it is (--format text, ...) or "
            "leave it out (--pattern)"
        )
    return dataclasses.replace(spec, format=next(iter(found), "text"))


def _format_of(name: str) -> str:
    """The format that a file of this name usually has; empty where none has."""
    return next((kind for kind, form in FORMATS.items() if _matches(name, form.patterns)), "")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a name, in letters of either case, is one that a format's files usually have."""
    return any(fnmatch.fnmatchcase(name.lower(), pattern) for pattern in patterns)


def plan(spec: SourceSpec) -> list[Unit]:
    """The units of a source, in a fixed order.

    Raises: SourceError if there is nothing to read; OSError.
    """
    with bucket_errors(spec.path):
        units = FORMATS[spec.format].plan(spec)
    if not units:
        raise SourceError(f"{spec.path} holds nothing of format {spec.format!r}")
    return units


def survey(spec: SourceSpec) -> dict[str, Any]:
    """How many files a source is read from ("read"), how many are "left_out" and the name of one
    of them ("example"); if some of those are no files that can be read (links to nothing, pipes),
    how many ("no_files") and one of them ("no_file"). Nothing of formats that are no files. Raises:
    SourceError, OSError."""
    if not FORMATS[spec.format].patterns:
        return {}
    with bucket_errors(spec.path):
        files, others = list_files(spec)
    counts = {"read": len(files), "left_out": len(others)}
    counts |= {"example": str(others[0])} if others else {}
    local = "://" not in spec.path  # a bucket has nothing of the kind
    odd = [f for f in others if local and not (is_file(f) or f.is_dir())]
    return counts | ({"no_files": len(odd), "no_file": str(odd[0])} if odd else {})


def read(spec: SourceSpec, unit: Unit) -> Iterator[Row]:
    """The rows of a unit.

    Raises: SourceError for a file that is damaged as a whole; OSError where storage fails.
    """
    form, rows = FORMATS[spec.format], 0
    try:
        with bucket_errors(unit.path):
            for value in form.read(spec, unit):
                yield value
                rows += 1
    except _DAMAGE as error:
        place = form.place(unit, rows, None)
        raise SourceError(f"{place}: the file cannot be read further: {error}") from error


def place(spec: SourceSpec, unit: Unit, row: int, before: int | None = None) -> str:
    """Where row number `row` of a unit stands, for people: file and line, or record.

    before: rows, blank lines too, of the file's earlier units; unless known, they may be read.
    """
    with bucket_errors(unit.path):
        return FORMATS[spec.format].place(unit, row, before)


_DAMAGE = (EOFError, zlib.error, gzip.BadGzipFile, _Damaged)


def _of_storage(error: Exception) -> bool:
    """Whether the system refused to read. Arrow calls damage an OSError too, without a number."""
    return isinstance(error, OSError) and error.errno is not None


def list_files(spec: SourceSpec) -> tuple[list[epath.Path], list[epath.Path]]:
    """The files that a source is read from, and those left out, both in the order of their names.

    Read are the file, a folder's files whose names are usual for the format, a glob's files; of
    these, those that match the pattern, if there is one. Raises: SourceError if that is none.
    """
    root = root_of(spec.path)
    files, folders = matched(root)
    wanted = spec.pattern or "*"
    chosen = [f for f in files if fnmatch.fnmatchcase(f.name, wanted)]
    if root.is_dir() and spec.format != "auto" and not spec.pattern:
        usual = FORMATS[spec.format].patterns
        wanted = ", ".join(usual)
        chosen = [f for f in files if _matches(f.name, usual)]
    others = sorted({*files, *folders}.difference(chosen))
    if not chosen:
        such = f" ({len(others)} others, such as {others[0]})" if others else ""
        stars = " (stars may stand in its last part)" if "*" in str(root.parent) else ""
        raise SourceError(
            f"{spec.path}: no such file (links to nothing and pipes are none), or none that "
            f"matches {wanted}{such}{stars}"
        )
    return sorted(chosen), others


def _files(spec: SourceSpec) -> list[tuple[epath.Path, str]]:
    """The source's files, and their names relative to it."""
    root = root_of(spec.path)
    base = root if root.is_dir() else root.parent
    return [(f, f.relative_to(base).as_posix()) for f in list_files(spec)[0]]


def _ranges(count: int, step: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, step):
        yield start, min(start + step, count)


def parse_json(data: bytes | str) -> dict[str, Any] | BadRow:
    """A JSON object, or the BadRow that says why it is none."""
    try:
        value = json.loads(data)
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", str(error))
    except (ValueError, RecursionError) as error:
        return BadRow("not_json", str(error)[:200])
    if not isinstance(value, dict):
        return BadRow("not_json", f"a JSON {type(value).__name__} where an object is due")
    return value


class _Text:
    """Trees of text files: a file is a row."""

    patterns: tuple[str, ...] = ("*.txt", "*.md", "*.rst", "*.py")

    def plan(self, spec: SourceSpec) -> list[Unit]:
        groups: list[list[tuple[str, int]]] = [[]]
        filled = 0  # bytes in the last group
        for file, name in _files(spec):
            if filled >= UNIT_BYTES or len(groups[-1]) >= UNIT_ROWS:
                groups.append([])
                filled = 0
            size = file.stat().length
            groups[-1].append((name, size))
            filled += size
        root = root_of(spec.path)
        base = root if root.is_dir() else root.parent
        return [self._unit(base, *zip(*group, strict=True)) for group in groups]

    @staticmethod
    def _unit(base: epath.Path, names: tuple[str, ...], sizes: tuple[int, ...]) -> Unit:
        stamp = stamp_of(base / name for name in names)
        return Unit(str(base), "", 0, len(names), sum(sizes), names, stamp)

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]:
        for name in unit.files:
            try:
                yield {"text": (epath.Path(unit.path) / name).read_bytes().decode()}
            except UnicodeDecodeError as error:
                yield BadRow("not_utf8", str(error))

    def place(self, unit: Unit, row: int, before: int | None) -> str:
        return str(epath.Path(unit.path) / unit.files[min(row, len(unit.files) - 1)])


class _JsonLines:
    """JSON objects, one a line. Plain files are cut at line ends, compressed ones stay whole."""

    patterns: tuple[str, ...] = (
        "*.jsonl",
        "*.jsonl.gz",
        "*.jsonl.zst",
        "*.ndjson",
        "*.json",
        "*.json.gz",
        "*.json.zst",
    )

    def plan(self, spec: SourceSpec) -> list[Unit]:
        units = []
        for file, name in _files(spec):
            size, whole = file.stat().length, _compression(str(file)) is not None
            if whole and not size:
                raise SourceError(f"{file} has no bytes: compressed, even nothing has some")
            step = size if whole else UNIT_BYTES
            stamp = stamp_of([file])
            units += [
                Unit(str(file), name, a, b, b - a, stamp=stamp) for a, b in _ranges(size, step)
            ]
        return units

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]:
        for line in self._lines(unit):
            yield parse_json(line) if line.strip() else None

    def _lines(self, unit: Unit) -> Iterator[bytes]:
        """The lines that begin within the unit."""
        with epath.Path(unit.path).open("rb") as raw:
            kind = _compression(unit.path)
            if kind is not None:
                yield from _OPENERS[kind](raw)
                return
            if unit.start:
                raw.seek(unit.start - 1)
                raw.readline()  # ends the line that began before
            while raw.tell() < unit.stop:
                yield raw.readline()

    def place(self, unit: Unit, row: int, before: int | None) -> str:
        if before is None:
            earlier = dataclasses.replace(unit, start=0, stop=unit.start)
            before = sum(1 for _ in self._lines(earlier)) if unit.start else 0
        return f"{unit.path}:{before + row + 1}"


def _compression(path: str) -> str | None:
    return next((suffix for suffix in _OPENERS if path.lower().endswith(suffix)), None)


def _open_zstd(raw) -> io.BufferedReader:
    return io.BufferedReader(_ZstdStream(raw, require("zstandard", "data", "reads .zst files")))


class _ZstdStream(io.RawIOBase):
    """Decompressed frames. zstandard's own reader takes a file that was cut off for one that ends;
    here damage of any kind is an error, as gzip has it."""

    def __init__(self, raw, zstandard):
        self._raw, self._zstandard = raw, zstandard
        self._frame, self._ready = None, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        while not self._ready:
            data = self._raw.read(1 << 17)
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends within a compressed frame")
                return 0
            self._ready = memoryview(self._decompress(data))
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _decompress(self, data: bytes) -> bytes:
        out = []
        while data:
            if self._frame is None:
                self._frame = self._zstandard.ZstdDecompressor().decompressobj()
            try:
                out.append(self._frame.decompress(data))
            except self._zstandard.ZstdError as error:
                raise _Damaged(str(error)) from error
            if not self._frame.eof:
                break
            data, self._frame = self._frame.unused_data, None
        return b"".join(out)


_OPENERS: dict[str, Callable[[Any], Any]] = {
    ".gz": lambda raw: gzip.GzipFile(fileobj=raw),
    ".zst": _open_zstd,
}


class _Parquet:
    """Parquet: a row of the table is a row; the units are row groups."""

    patterns: tuple[str, ...] = ("*.parquet",)

    def plan(self, spec: SourceSpec) -> list[Unit]:
        units = []
        for file, name in _files(spec):
            with file.open("rb") as raw:
                meta = self._open(raw, str(file)).metadata
                groups = [meta.row_group(i).total_byte_size for i in range(meta.num_row_groups)]
            stamp = stamp_of([file])
            units += [
                Unit(str(file), name, i, i + 1, size, stamp=stamp) for i, size in enumerate(groups)
            ]
        return units

    def _open(self, raw, name: str):
        pyarrow = require("pyarrow", "data", "reads Parquet")
        parquet = importlib.import_module("pyarrow.parquet")
        try:
            return parquet.ParquetFile(raw, page_checksum_verification=True)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if _of_storage(error):
                raise
            raise SourceError(f"{name} is no Parquet file: {error}") from error

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]:
        with epath.Path(unit.path).open("rb") as raw:
            for batch in self._batches(raw, unit):
                try:
                    rows = batch.to_pylist()
                except (ValueError, OverflowError):
                    rows = [_arrow_row(batch, i) for i in range(batch.num_rows)]
                yield from rows

    def _batches(self, raw, unit: Unit) -> Iterator[Any]:
        pyarrow = require("pyarrow", "data", "reads Parquet")
        table = self._open(raw, unit.path)
        try:
            yield from table.iter_batches(batch_size=256, row_groups=[unit.start])
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            if _of_storage(error):
                raise
            raise _Damaged(str(error)) from error

    def place(self, unit: Unit, row: int, before: int | None) -> str:
        return f"{unit.path}: row {row} of row group {unit.start}"


def _arrow_row(batch, index: int) -> Row:
    return _python_row(lambda: batch.slice(index, 1).to_pylist()[0])


def _python_row(convert: Callable[[], Row]) -> Row:
    """convert(), which makes Python values of Arrow's, or the BadRow that says why it cannot."""
    try:
        return convert()
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", str(error))
    except (ValueError, OverflowError) as error:  # dates and times that Python has no value for
        return BadRow("wrong_type", str(error))


class _ArrayRecord:
    """ArrayRecord files whose records are JSON objects or UTF-8 texts."""

    patterns: tuple[str, ...] = ("*.array_record", "*.arrayrecord", "*.array_record-*")

    def plan(self, spec: SourceSpec) -> list[Unit]:
        if "://" in spec.path:
            raise SourceError(
                f"{spec.path}: ArrayRecord files are read from disks: mount the bucket (gcsfuse), "
                "or copy them (gcloud storage rsync)"
            )
        units = []
        for file, name in _files(spec):
            count, size = self._reader(str(file)).num_records(), file.stat().length
            stamp = stamp_of([file])
            units += [
                Unit(str(file), name, a, b, size * (b - a) // count, stamp=stamp)
                for a, b in _ranges(count, UNIT_ROWS)
            ]
        return units

    @staticmethod
    def _reader(path: str):
        module = importlib.import_module("array_record.python.array_record_module")
        with open(path, "rb"):  # the library takes a file that it cannot open for an empty one
            pass
        try:
            return module.ArrayRecordReader(os.fsencode(path))
        except (RuntimeError, ValueError) as error:
            if system_call_failed(error):
                raise OSError(str(error)) from error
            raise SourceError(f"{path} is no ArrayRecord file: {error}") from error

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]:
        reader = self._reader(unit.path)
        for start, stop in _ranges(unit.stop - unit.start, 256):
            try:
                records = reader.read(unit.start + start, unit.start + stop)
            except (RuntimeError, ValueError, IndexError) as error:
                if system_call_failed(error):
                    raise OSError(str(error)) from error
                raise _Damaged(str(error)) from error
            for record in records:
                yield parse_json(record) if spec.records == "json" else _text_row(record)

    def place(self, unit: Unit, row: int, before: int | None) -> str:
        return f"{unit.path}: record {unit.start + row}"


def system_call_failed(error: Exception) -> bool:
    """Whether ArrayRecord's error, which is also that of damage, is one of the system."""
    return re.search(r"\b\w+\(\) failed", str(error)) is not None


def _text_row(record: bytes) -> Row:
    try:
        return {"text": record.decode()}
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", str(error))


class _HuggingFace:
    """A Hugging Face dataset on disk, as `save_to_disk` writes it."""

    patterns: tuple[str, ...] = ()

    def plan(self, spec: SourceSpec) -> list[Unit]:
        rows = len(self._load(spec.path, spec.split))
        stamp = stamp_of(sorted(walk(root_of(spec.path))[0]))
        return [Unit(spec.path, "", a, b, b - a, stamp=stamp) for a, b in _ranges(rows, UNIT_ROWS)]

    @staticmethod
    @functools.lru_cache(maxsize=4)
    def _load(path: str, split: str):
        datasets = require("datasets", "data", "reads Hugging Face datasets")
        try:
            loaded = datasets.load_from_disk(path)
        except Exception as error:  # whatever it stumbles over where a file is damaged
            if _of_storage(error) and not isinstance(error, FileNotFoundError):
                raise
            raise SourceError(f"{path} is no dataset on disk: {describe(error)}") from error
        if not isinstance(loaded, dict):
            return loaded
        if split not in loaded:
            raise SourceError(f"{path} has no split {split!r}; it has {', '.join(loaded)}")
        return loaded[split]

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]:
        rows = self._load(spec.path, spec.split)
        for index in range(unit.start, unit.stop):
            yield _python_row(functools.partial(rows.__getitem__, index))

    def place(self, unit: Unit, row: int, before: int | None) -> str:
        return f"{unit.path}: row {unit.start + row}"


class _Seqio:
    """A seqio Task or Mixture, read once and in order; path is "module:name" (the module registers
    it). Tensors come as Python values. A task with sharded files is a unit a file."""

    patterns: tuple[str, ...] = ()

    def plan(self, spec: SourceSpec) -> list[Unit]:
        seqio, task = self._task(spec.path)
        shards = 1
        if isinstance(task, seqio.Task):
            shards = max(1, len(task.source.list_shards(spec.split)))
        return [Unit(spec.path, "", i, shards, 1) for i in range(shards)]

    @staticmethod
    def _task(path: str):
        seqio = require("seqio", "seqio", "reads seqio tasks")
        module, _, name = path.rpartition(":")
        if module:
            importlib.import_module(module)
        try:
            return seqio, seqio.get_mixture_or_task(name)
        except ValueError as error:
            raise SourceError(
                f"seqio knows no task {name!r}; name the module that registers it: MODULE:{name}"
            ) from error

    def read(self, spec: SourceSpec, unit: Unit) -> Iterator[Row]:
        seqio, task = self._task(spec.path)
        dataset = task.get_dataset(
            sequence_length=None,
            split=spec.split,
            shuffle=False,
            num_epochs=1,
            seed=0,  # a mixture samples its tasks in this order, and no other
            shard_info=seqio.ShardInfo(unit.start, unit.stop),
        )
        for row in dataset.as_numpy_iterator():
            yield _plain_row(row)

    def place(self, unit: Unit, row: int, before: int | None) -> str:
        return f"seqio {unit.path}: example {row} of shard {unit.start}"


def _plain_row(row: dict[str, Any]) -> Row:
    """Tensors' values as JSON would have them."""
    try:
        return {name: _plain(value) for name, value in row.items()}
    except UnicodeDecodeError as error:
        return BadRow("not_utf8", str(error))


def _plain(value: Any) -> Any:
    value = value.tolist() if hasattr(value, "tolist") else value
    return value.decode() if isinstance(value, bytes) else value


FORMATS: dict[str, Format] = {
    "jsonl": _JsonLines(),
    "parquet": _Parquet(),
    "array_record": _ArrayRecord(),
    "huggingface": _HuggingFace(),
    "seqio": _Seqio(),
    "text": _Text(),
}
