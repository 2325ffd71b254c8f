"""A small tokenizer, and sources in every format, that tests of the data share."""

import functools
import gzip
import json
from pathlib import Path

from array_record.python.array_record_module import ArrayRecordWriter
from tokenizers import Tokenizer

from llada2_jax.data import sources
from llada2_jax.data.encoders import EncodeOptions
from llada2_jax.data.prepare import Job
from llada2_jax.data.prepared import PreparedDocuments
from llada2_jax.data.sources import SourceSpec
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.types import SpecialTokens

SPECIAL = SpecialTokens(mask=0, eos=1, pad=1, bos=2)
WORDS = ["alpha", "beta", "gamma", "delta", "epsilon", "naïve", "你好"]


@functools.cache
def files() -> dict[str, str]:
    """A byte-level tokenizer of 300 ids with LLaDA2's reserved tokens."""
    return tokenizer_files(train_tokenizer([" ".join(WORDS * 9)], 300))


def texts(count: int) -> list[str]:
    """Texts of different lengths, all different."""
    return [
        f"{i}: " + " ".join(WORDS[(i + j) % 7] for j in range(1 + i % 11)) for i in range(count)
    ]


def write_jsonl(path: Path, rows: list) -> Path:
    """Rows as JSON lines (strings as they are), compressed as the name says."""
    lines = "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows).encode()
    if path.suffix == ".gz":
        lines = gzip.compress(lines)
    elif path.suffix == ".zst":
        import zstandard

        lines = zstandard.compress(lines)
    path.write_bytes(lines)
    return path


def job(path: Path | str, *, max_bad=0.0, validation=20.0, source=None, **encode) -> Job:
    """Preparation of a source with the small tokenizer; storage that fails is not waited for."""
    return Job(
        SourceSpec(str(path), **(source or {})),
        EncodeOptions(**encode),
        files(),
        SPECIAL,
        max_bad,
        validation,
        retry_seconds=0.0,
    )


def contents(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def documents_of(folder: Path) -> list[tuple[str, list[float]]]:
    """(text, weights) of all documents of both splits, read back in order of splits."""
    found = []
    tokenizer = Tokenizer.from_str(files()["tokenizer.json"])
    for split in ("train", "validation"):
        documents = PreparedDocuments(folder, split)
        for i, n in enumerate(documents.lengths):
            tokens, weights = documents.read(i, 0, int(n))
            assert tokens[0] == SPECIAL.bos and tokens[-1] == SPECIAL.eos
            found.append((tokenizer.decode(tokens[1:-1].tolist()), weights.tolist()))
    return found


def _text(folder, rows):
    for i, row in enumerate(rows):
        below = folder / f"{i % 3}"
        below.mkdir(parents=True, exist_ok=True)
        (below / f"{i:03d}.txt").write_text(row, encoding="utf-8")


def _jsonl(suffix):
    def write(folder, rows):
        half = [{"text": r} for r in rows[: len(rows) // 2]]
        write_jsonl(folder / f"a.jsonl{suffix}", half)
        # Blank lines are no rows.
        write_jsonl(
            folder / f"b.jsonl{suffix}", ["", *({"text": r} for r in rows[len(half) :]), ""]
        )

    return write


def _parquet(folder, rows):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": rows, "other": list(range(len(rows)))})
    pyarrow.parquet.write_table(table, folder / "a.parquet", row_group_size=7)


def _array_record(folder, rows):
    writer = ArrayRecordWriter(str(folder / "a.array_record"), "group_size:1")
    for row in rows:
        writer.write(json.dumps({"text": row}).encode())
    writer.close()


def _huggingface(folder, rows):
    import datasets

    datasets.Dataset.from_dict({"text": rows}).save_to_disk(str(folder))


FORMATS = {
    "text": _text,
    "jsonl": _jsonl(""),
    "jsonl.gz": _jsonl(".gz"),
    "jsonl.zst": _jsonl(".zst"),
    "parquet": _parquet,
    "array_record": _array_record,
    "huggingface": _huggingface,
}


def eight_units(folder: Path, monkeypatch) -> Path:
    """Makes a folder of one file that falls into eight units."""
    folder.mkdir()
    path = write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(60)])
    monkeypatch.setattr(sources, "UNIT_BYTES", -(-path.stat().st_size // 8))
    return folder
