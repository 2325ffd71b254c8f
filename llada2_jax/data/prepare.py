"""A source, tokenized once: ArrayRecord shards, an index, and a manifest that accounts for it all.

Each unit of the source becomes a shard of its own for each split, whichever process makes it, and
counts as done when its `.json` is there. So the output does not depend on the number of processes,
and a run that was stopped goes on where it stopped.
"""

from __future__ import annotations

import collections
import concurrent.futures
import concurrent.futures.process
import contextlib
import dataclasses
import functools
import hashlib
import io
import itertools
import json
import logging
import math
import multiprocessing
import os
import re
import shutil
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import Tokenizer

from llada2_jax.data.chat import LLADA2_TEMPLATE
from llada2_jax.data.documents import stable_hash
from llada2_jax.data.encoders import EncodeOptions, make_encoder
from llada2_jax.data.examples import BAD_ROW_KINDS, BadRow, Encoder, Example, encode_record
from llada2_jax.data.folder_lock import LOCK, FolderLock, end_with_parent, lock_folder
from llada2_jax.data.sources import SourceSpec, Unit, place, plan, read, resolve_format, survey
from llada2_jax.data.tokenizer import vocab_size
from llada2_jax.errors import UsageError, UserError
from llada2_jax.files import replace_text, sync, temporary_of
from llada2_jax.folders import TOKENIZER_FILES
from llada2_jax.retry import storage_failed, with_retries
from llada2_jax.types import SpecialTokens

FORMAT_VERSION = 3
MANIFEST, PLAN, TOKENIZER = "manifest.json", "plan.json", "tokenizer"
SPLITS = ("train", "validation")
# Long texts are kept in records of this many tokens, so that a row never reads megabytes.
CHUNK_TOKENS = 1 << 16
# Before the end, bad rows are judged once this many rows were read; within a unit, which says
# little of the others, only where more than half are bad.
ROWS_TO_JUDGE, HOPELESS = 1000, 0.5
EXAMPLES_KEPT, EXAMPLES_TOLD = 5, 100  # bad rows: of a kind in a unit; in the manifest
_SHARD_OPTIONS = "group_size:1,zstd:3"
REPORT_FIELDS = ("size", "lines", "rows", "bad", "shown", "splits")

INDEX = np.dtype(
    [
        ("id", "<i4"),  # stable hash of the row's name
        ("row", "<u4"),  # number in its unit, to find it again
        ("tokens", "<u4"),
        ("chosen", "<u4"),  # of a pair: tokens of the first text
        ("first_supervised", "<u4"),
        ("supervised_end", "<u4"),
        ("supervised", "<u4"),  # tokens with a weight
    ]
)


class PrepareError(UserError, RuntimeError):
    """Preparation cannot go on; the message says why and what to do."""


@dataclasses.dataclass(frozen=True)
class Job:
    """All that decides the output, bit for bit; and what is borne on the way: max_bad_fraction, the
    share of rows that may be bad (skipped and counted), and retry_seconds, how long storage may
    fail. validation_percent: share of rows, by the hash of their names, that goes to the
    validation split."""

    source: SourceSpec
    encode: EncodeOptions
    tokenizer_files: Mapping[str, str]
    special: SpecialTokens
    max_bad_fraction: float = 0.001
    validation_percent: float = 2.0
    retry_seconds: float = 60.0

    def __post_init__(self):
        bounds = {"max_bad_fraction": 1, "validation_percent": 100, "retry_seconds": math.inf}
        for name, most in bounds.items():
            value = getattr(self, name)
            if not 0 <= value <= most:  # nan is not, either
                raise UsageError(f"{name}={value}: choose a number from 0 to {most}")

    @functools.cached_property
    def vocab_size(self) -> int:
        return vocab_size(Tokenizer.from_str(self.tokenizer_files["tokenizer.json"]))

    @property
    def token_dtype(self) -> np.dtype:
        return np.dtype("<u2" if self.vocab_size <= 1 << 16 else "<u4")

    def describe(self) -> dict[str, Any]:
        """What the manifest says of the job: JSON, and equal for equal outputs."""
        described = {
            "version": FORMAT_VERSION,
            "source": dataclasses.asdict(self.source),
            "encode": dataclasses.asdict(self.encode),
            "tokenizer": {
                "sha256": tokenizer_hash(self.tokenizer_files["tokenizer.json"]),
                "vocab_size": self.vocab_size,
            },
            "special": dataclasses.asdict(self.special),
            "validation_percent": self.validation_percent,
        }
        templates = {
            "llada2": LLADA2_TEMPLATE,
            "tokenizer": self.tokenizer_files.get("chat_template.jinja", "")
            + self.tokenizer_files.get("tokenizer_config.json", ""),
        }
        if self.encode.content in ("chat", "preference") and self.encode.template in templates:
            text = templates[self.encode.template]  # any other is its own text, see encode
            described["template_sha256"] = hashlib.sha256(text.encode()).hexdigest()
        return described


def tokenizer_hash(tokenizer_json: str) -> str:
    """SHA-256 of a tokenizer, whatever the layout of its file."""
    return hashlib.sha256(Tokenizer.from_str(tokenizer_json).to_str().encode()).hexdigest()


def prepare(
    job: Job,
    folder: str | Path,
    *,
    processes: int = 0,
    overwrite: bool = False,
    progress: Callable[[list[Unit], Iterator[dict]], Iterator[dict]] | None = None,
) -> dict[str, Any]:
    """Writes `folder`, or finishes it; returns the manifest.

    Args:
      processes: workers; 0: one for each core.
      overwrite: start again, without what is there.
      progress: wraps the stream of unit reports (a progress bar); it sees the units still to do.

    Raises: SourceError, TemplateError, PrepareError (too many bad rows, another job's folder),
    LockedError (another process writes it), StorageError.
    """
    if "://" in str(folder):
        raise PrepareError(
            f"{folder}: ArrayRecord files are written to disks; prepare into a local folder and "
            "copy it (gcloud storage rsync), or mount the bucket (gcsfuse)"
        )
    make_encoder(job.encode, dict(job.tokenizer_files), job.special)  # fails here, not in a worker
    folder = Path(folder)
    job, units, files = with_retries(
        lambda: _explored(job),
        f"reading {job.source.path}",
        seconds=job.retry_seconds,
        passes=_may_pass,
    )
    _check_apart(job.source, folder)
    own_files = functools.partial(
        with_retries, what=f"writing {folder}", seconds=job.retry_seconds, passes=_may_pass
    )
    own_files(lambda: folder.mkdir(parents=True, exist_ok=True))
    if not (folder / LOCK).exists():  # no lock in somebody else's folder
        _check_prepared(folder)
    with own_files(lambda: lock_folder(folder)) as lock:
        _check_prepared(folder)
        if overwrite:
            clear(folder)
        own_files(lambda: _record_plan(folder, job, units))
        _do_units(job, units, folder, lock, processes or os.cpu_count() or 1, progress)
        return own_files(lambda: _write_manifest(job, units, files, folder))


def _do_units(
    job: Job, units: list[Unit], folder: Path, lock: FolderLock, processes: int, progress
) -> None:
    """Does those that are not done. Raises: as prepare."""
    done = {i for i in range(len(units)) if (folder / f"{i:05d}.json").exists()}
    left = [i for i in range(len(units)) if i not in done]
    tally = Tally(job, dict(enumerate(units)))
    source_size = sum(unit.size for unit in units)
    for i in sorted(done):
        tally.add(_read_own(folder / f"{i:05d}.json", REPORT_FIELDS))
    with contextlib.closing(_run(job, units, left, folder, lock, processes)) as reports:
        shown = reports if progress is None else progress([units[i] for i in left], reports)
        for report in shown:
            tally.add(report)
            if tally.rows >= ROWS_TO_JUDGE:
                rows = tally.rows * source_size / max(tally.size, 1)  # there will be in the end
                tally.judge(allowed=job.max_bad_fraction * rows)
    tally.judge(allowed=job.max_bad_fraction * tally.rows)


def _check_apart(source: SourceSpec, folder: Path) -> None:
    """What is written must not become part of what is read, nor the source go with the output."""
    if "://" in source.path or source.format == "seqio":  # no path of this machine
        return
    read, written = Path(source.path).expanduser().resolve(), folder.resolve()
    if written.is_relative_to(read):
        raise PrepareError(
            f"{folder} lies in the source {source.path}: name a folder outside of it"
        )
    if read.is_relative_to(written):
        raise PrepareError(f"the source {source.path} lies in {folder}: name another folder")


def _may_pass(error: Exception) -> bool:
    """Whether a source may be readable in a while."""
    absent = (FileNotFoundError, NotADirectoryError, PermissionError)
    return storage_failed(error) and not isinstance(error, absent)


def _explored(job: Job) -> tuple[Job, list[Unit], dict[str, Any]]:
    """The job with its source's format known, its units, and the count of its files."""
    source = resolve_format(job.source)
    units, files = plan(source), survey(source)
    if files.get("left_out") and not source.pattern:
        logging.getLogger(__name__).warning(
            "%s: %d files of format %s are read, %d are left out, such as %s (--format, --pattern)",
            *(source.path, files["read"], source.format, files["left_out"], files["example"]),
        )
    if files.get("no_files"):
        logging.getLogger(__name__).warning(
            "%s: %d links to nothing, pipes or the like are left out, such as %s: repair or remove "
            "them if their texts are wanted",
            *(source.path, files["no_files"], files["no_file"]),
        )
    return dataclasses.replace(job, source=source), units, files


def _inside(folder: Path) -> list[Path]:
    """What is in a prepared folder, but for its lock, and for what NFS keeps of removed files while
    somebody reads them."""
    return [p for p in folder.iterdir() if p.name != LOCK and not p.name.startswith(".nfs")]


def _check_prepared(folder: Path) -> None:
    """Raises: PrepareError if the folder is somebody else's; OSError."""
    expected = {folder / TOKENIZER, *_torn_plans(folder)}
    if not (folder / PLAN).exists() and not expected.issuperset(_inside(folder)):
        raise PrepareError(
            f"{folder} holds other files and no {PLAN}, so it was not prepared: name an empty or a "
            "new folder"
        )


def _record_plan(folder: Path, job: Job, units: list[Unit]) -> None:
    """Writes plan.json, or checks that the one there is this job's."""
    wanted = {"job": job.describe(), "units": [dataclasses.asdict(u) for u in units]}
    wanted = json.loads(json.dumps(wanted))
    path = folder / PLAN
    if not path.exists():
        for temporary in _torn_plans(folder):
            temporary.unlink()
        (folder / TOKENIZER).mkdir(exist_ok=True)
        for name, text in job.tokenizer_files.items():
            (folder / TOKENIZER / name).write_bytes(text.encode())
            sync(folder / TOKENIZER / name)
        write_json(path, wanted)
        return
    found = _read_own(path, wanted)
    changed = [k for k, v in wanted["job"].items() if found["job"].get(k) != v]
    if found["units"] != wanted["units"]:
        changed.append("files of the source (names, sizes or times of change)")
    if changed:
        raise PrepareError(
            f"{folder} was begun with another {', '.join(changed)}: choose another folder, or "
            "remove it to start again (--overwrite)"
        )


def _read_own(path: Path, fields: Iterable[str]) -> dict[str, Any]:
    """What an earlier run wrote. Raises: PrepareError if that is not what the file holds."""
    try:
        found = json.loads(path.read_text())
    except ValueError:
        found = None
    if not isinstance(found, dict) or not found.keys() >= set(fields):
        raise PrepareError(f"{path} is damaged: prepare the folder again (--overwrite)")
    return found


def clear(folder: Path) -> None:
    """Removes what is in a prepared folder, but for its lock. Raises: PrepareError, before anything
    is removed, if it holds what `prepare` does not write; OSError."""
    inside = _inside(folder)
    if foreign := sorted(path for path in inside if not _is_own(path)):
        raise PrepareError(
            f"{foreign[0]} is not of the prepared data that --overwrite replaces: move it away, or "
            "choose another folder"
        )
    # A unit is not done without its report, and the folder is a prepared one until the end. The
    # tokenizer is written when there is no plan.
    order = {TOKENIZER: 2, PLAN: 1}
    for path in sorted(inside, key=lambda p: (order.get(p.name, 0), p.suffix != ".json")):
        shutil.rmtree(path) if path.name == TOKENIZER else path.unlink()


_NAMES = rf"(\d{{5,}}\.(json|({'|'.join(SPLITS)})\.(array_record|npy))|{MANIFEST}|{PLAN})"
_OWN = re.compile(rf"{_NAMES}|\.{_NAMES}\..+")  # the latter are left where writing is interrupted


def _is_own(path: Path) -> bool:
    """Whether a file or folder in a prepared folder is one that `prepare` writes."""
    if path.name == TOKENIZER and path.is_dir() and not path.is_symlink():
        return {p.name for p in path.iterdir()} <= set(TOKENIZER_FILES)
    return _OWN.fullmatch(path.name) is not None and not path.is_dir()


def _torn_plans(folder: Path) -> Iterator[Path]:
    """What is left of plans whose writing was interrupted."""
    return folder.glob(f".{PLAN}.*")


def write_json(path: Path, value: Any) -> None:
    """The whole file or none of it."""
    replace_text(path, json.dumps(value, indent=1))


# ------------------------------------------------------------------------------------ workers


def _run(
    job: Job,
    units: list[Unit],
    numbers: list[int],
    folder: Path,
    lock: FolderLock,
    processes: int,
) -> Generator[dict[str, Any]]:
    """Reports of the units as they are done."""
    if processes == 1 or len(numbers) <= 1:
        writer = UnitWriter(job, folder)
        yield from (writer.write(i, units[i]) for i in numbers)
        return
    # spawn: a fork would inherit the locks of the tokenizer's threads.
    context = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(numbers)), context, _start_worker, (job, folder, lock)
    )
    try:
        futures = [pool.submit(_work, i, units[i]) for i in numbers]
        yield from (f.result() for f in concurrent.futures.as_completed(futures))
    except concurrent.futures.process.BrokenProcessPool as error:
        raise PrepareError(
            "a worker died (out of memory?); what is done is kept: run it again, with fewer "
            "--processes"
        ) from error
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_worker: UnitWriter | None = None


def _start_worker(job: Job, folder: Path, lock: FolderLock) -> None:
    """lock: held by this process, too, from now on."""
    global _worker
    end_with_parent()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _worker = UnitWriter(job, folder)


def _work(number: int, unit: Unit) -> dict[str, Any]:
    assert _worker is not None
    return _worker.write(number, unit)


class UnitWriter:
    """Turns units into shards."""

    def __init__(self, job: Job, folder: Path):
        self._job, self._folder = job, folder
        self._encode: Encoder = make_encoder(job.encode, dict(job.tokenizer_files), job.special)
        self._dtype = job.token_dtype

    def write(self, number: int, unit: Unit) -> dict[str, Any]:
        """Writes the shards of a unit and its report, the latter last; returns the report. Where
        storage fails the unit is begun again.

        Raises: SourceError, PrepareError, StorageError.
        """
        what = f"preparing unit {number} ({unit.path})"
        return with_retries(
            lambda: self._write(number, unit), what, seconds=self._job.retry_seconds
        )

    def _write(self, number: int, unit: Unit) -> dict[str, Any]:
        tally = Tally(self._job, {number: unit})
        with contextlib.ExitStack() as stack:
            paths = {split: self._folder / f"{number:05d}.{split}" for split in SPLITS}
            shards = {s: stack.enter_context(_Shard(path)) for s, path in paths.items()}
            lines = self._fill(shards, number, unit, tally)
            splits = {split: shard.close() for split, shard in shards.items()}
        report = {
            "size": unit.size,
            "lines": lines,
            "rows": tally.rows,
            "bad": dict(sorted(tally.bad.items())),
            "shown": tally.shown,
            "splits": splits,
        }
        write_json(self._folder / f"{number:05d}.json", report)
        return report

    def _fill(self, shards: dict[str, _Shard], number: int, unit: Unit, tally: Tally) -> int:
        """Returns the number of rows, blank lines too."""
        index = -1
        fraction = self._job.max_bad_fraction and max(self._job.max_bad_fraction, HOPELESS)
        for index, row in enumerate(read(self._job.source, unit)):
            if row is None:
                continue
            tally.rows += 1
            try:
                example = self._example(row)
            except BadRow as error:
                tally.bad[error.kind] += 1
                if tally.bad[error.kind] <= EXAMPLES_KEPT:
                    shown = {"kind": error.kind, "unit": number, "row": index, "why": str(error)}
                    tally.shown.append(shown)
                tally.judge(allowed=fraction * max(tally.rows, ROWS_TO_JUDGE))
                continue
            name = unit.row_name(index)
            split = split_of(name, self._job.validation_percent)
            shards[split].write(example, stable_hash(name), index, self._dtype)
        return index + 1

    def _example(self, row: dict[str, Any] | BadRow) -> Example:
        if isinstance(row, BadRow):
            raise row
        return self._encode(row)


def split_of(name: str, validation_percent: float) -> str:
    """ "train" or "validation", by the hash of the name alone."""
    chance = stable_hash("split:" + name) % 10_000
    return "validation" if chance < validation_percent * 100 else "train"


class _Shard:
    """Records and index entries of one unit and split."""

    def __init__(self, path: Path):
        self._records_path, self._index_path = Path(f"{path}.array_record"), Path(f"{path}.npy")
        with self._storage_errors():
            temporary = temporary_of(self._records_path)
            self._writer = ArrayRecordWriter(os.fsencode(temporary), _SHARD_OPTIONS)
        self._entries: list[tuple[int, ...]] = []
        self._records = 0
        self._weights: set[float] = set()
        self._sha256 = hashlib.sha256()

    def __enter__(self) -> _Shard:
        return self

    def __exit__(self, *_) -> None:
        """Lets go of a file whose writing was broken off: it may be written anew."""
        with contextlib.suppress(RuntimeError, ValueError):
            if self._writer.is_open():
                self._writer.close()

    def write(self, example: Example, document: int, row: int, dtype: np.dtype) -> None:
        for piece in _chunks(example):
            record = encode_record(piece, dtype)
            with self._storage_errors():
                self._writer.write(record)
            self._sha256.update(record)
            self._records += 1
        supervised = int(np.count_nonzero(example.weights))
        span = (example.first_supervised, example.supervised_end)
        entry = (document, row, len(example.tokens), example.chosen, *span, supervised)
        self._entries.append(entry)
        self._weights.update(np.unique(example.weights).tolist())

    def close(self) -> dict[str, Any]:
        """Ends both files and names them; returns what the manifest says of them."""
        with self._storage_errors():
            self._writer.close()
        index = np.asarray(self._entries, INDEX)
        file = io.BytesIO()
        np.save(file, index)
        temporary_of(self._index_path).write_bytes(file.getvalue())
        for path in (self._records_path, self._index_path):
            sync(temporary_of(path))
            temporary_of(path).replace(path)
        self._sha256.update(index.tobytes())
        return {
            "documents": len(index),
            "records": self._records,
            "tokens": int(index["tokens"].sum(dtype=np.int64)),
            "supervised_tokens": int(index["supervised"].sum(dtype=np.int64)),
            "longest": int(index["tokens"].max(initial=0)),
            "weighted": not self._weights <= {0.0, 1.0},
            "sha256": self._sha256.hexdigest(),
            "crc32": zlib.crc32(file.getvalue()),  # of the index, as the file has it
        }

    @contextlib.contextmanager
    def _storage_errors(self) -> Iterator[None]:
        """A full disk is an OSError, whatever ArrayRecord makes of it."""
        try:
            yield
        except (RuntimeError, ValueError) as error:
            raise OSError(f"{self._records_path}: {error}") from error


def _chunks(example: Example) -> Iterator[Example]:
    """A pair stays whole: it is always read as a whole."""
    if example.chosen:
        yield example
        return
    for start in range(0, len(example.tokens), CHUNK_TOKENS):
        part = slice(start, start + CHUNK_TOKENS)
        yield Example(example.tokens[part], example.weights[part])


# -------------------------------------------------------------------------------- accounting


class Tally:
    """Rows read, their size in what units count, bad rows by kind, and when these are too many."""

    def __init__(self, job: Job, units: Mapping[int, Unit]):
        self._job, self._units = job, units
        self.rows = self.size = 0
        self.bad: collections.Counter[str] = collections.Counter()
        self.shown: list[dict[str, Any]] = []

    def add(self, report: Mapping[str, Any]) -> None:
        self.rows += report["rows"]
        self.size += report["size"]
        self.bad.update(report["bad"])
        self.shown += report["shown"]

    def judge(self, *, allowed: float) -> None:
        """Raises PrepareError, with where they stand, if more rows are bad than `allowed`."""
        count = sum(self.bad.values())
        if count <= allowed:
            return
        kinds = "; ".join(f"{n} {kind} ({BAD_ROW_KINDS[kind]})" for kind, n in self.bad.items())
        first = {shown["kind"]: shown for shown in reversed(self.shown)}
        examples = "\n  ".join(map(self._tell, first.values()))
        raise PrepareError(
            f"{count} of {self.rows} rows are bad, and max_bad_fraction is "
            f"{self._job.max_bad_fraction:g}: "
            f"{kinds}. For example:\n  {examples}\nRepair the source, or raise the fraction "
            "(--max-bad-fraction); what is done is kept"
        )

    def _tell(self, shown: Mapping[str, Any]) -> str:
        where = place(self._job.source, self._units[shown["unit"]], shown["row"])
        return f"{where}: {shown['why']}"


def _write_manifest(
    job: Job, units: list[Unit], files: dict[str, Any], folder: Path
) -> dict[str, Any]:
    """Returns what it writes."""
    reports = [_read_own(folder / f"{i:05d}.json", REPORT_FIELDS) for i in range(len(units))]
    splits = {split: _total([r["splits"][split] for r in reports]) for split in SPLITS}
    bad = sum((collections.Counter(r["bad"]) for r in reports), collections.Counter())
    manifest = {
        **job.describe(),
        "files": files,
        "rows": {"read": sum(r["rows"] for r in reports), "bad": dict(sorted(bad.items()))},
        "bad_examples": list(itertools.islice(_told(job, units, reports), EXAMPLES_TOLD)),
        "token_bytes": job.token_dtype.itemsize,
        "chunk_tokens": CHUNK_TOKENS,
        "splits": splits,
        "shards": [{s: _shard(r["splits"][s]) for s in SPLITS} for r in reports],
    }
    write_json(folder / MANIFEST, manifest)
    return manifest


def _told(job: Job, units: list[Unit], reports: list[dict[str, Any]]) -> Iterator[dict[str, str]]:
    """Bad rows and their places. As all units were read, no file needs to be again."""
    before: collections.Counter[str] = collections.Counter()
    for unit, report in zip(units, reports, strict=True):
        for shown in report["shown"]:
            where = place(job.source, unit, shown["row"], before[unit.path])
            yield {"kind": shown["kind"], "place": where, "why": shown["why"]}
        before[unit.path] += report["lines"]


def _shard(report: dict[str, Any]) -> dict[str, int]:
    """What a reader checks a shard against."""
    return {"records": report["records"], "crc32": report["crc32"]}


def _total(parts: list[dict[str, Any]]) -> dict[str, Any]:
    sums = ("documents", "records", "tokens", "supervised_tokens")
    total: dict[str, Any] = {name: sum(p[name] for p in parts) for name in sums}
    total["longest"] = max(p["longest"] for p in parts)
    total["weighted"] = any(p["weighted"] for p in parts)
    total["sha256"] = hashlib.sha256("".join(p["sha256"] for p in parts).encode()).hexdigest()
    return total
