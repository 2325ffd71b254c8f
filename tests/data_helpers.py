"""A small tokenizer, and sources in every format, that tests of the data share."""

import functools
import gzip
import json
from pathlib import Path

from llada2_jax.data.encoders import EncodeOptions
from llada2_jax.data.prepare import Job
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
