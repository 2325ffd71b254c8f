"""Prepared data as it is read back: whole, from many shards, where storage fails, by any number of
processes."""

import concurrent.futures
import dataclasses
import errno
import io
import json
import os
import resource
import sys
import time
import types
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter
from tokenizers import Tokenizer

from llada2_jax import cli, retry
from llada2_jax.config import DataConfig
from llada2_jax.data import shards, sources
from llada2_jax.data.corpus import load_corpus
from llada2_jax.data.documents import Document
from llada2_jax.data.examples import Example, decode_record, encode_record
from llada2_jax.data.loader import batches
from llada2_jax.data.packing import tokenize
from llada2_jax.data.prepare import (
    FORMAT_VERSION,
    MANIFEST,
    prepare,
)
from llada2_jax.data.prepared import PreparedDocuments, PreparedError, read_manifest
from llada2_jax.files import ENOUGH_FILES, open_files_limit, raise_open_files_limit
from tests.data_helpers import (
    FORMATS,
    SPECIAL,
    eight_units,
    files,
    job,
    texts,
    write_jsonl,
)

TOKENIZER = Tokenizer.from_str(files()["tokenizer.json"])


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    return eight_units(tmp_path / "in", monkeypatch)


def test_records_survive_and_damage_is_seen():
    example = Example(np.arange(5, dtype=np.int32), np.float32([0, 0, 1, 1, 0.25]))
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        record = encode_record(example, dtype)
        tokens, weights = decode_record(record, dtype)
        np.testing.assert_array_equal(tokens, example.tokens)
        np.testing.assert_array_equal(weights, example.weights)
        for damaged in (b"", record[:7], record[:-1], record + b"x", b"\xff" * len(record)):
            with pytest.raises(ValueError, match="not a record of tokens"):
                decode_record(damaged, dtype)


def test_damaged_folders_are_named(source, tmp_path):
    out = tmp_path / "out"
    prepare(job(source), out, processes=1)
    with pytest.raises(PreparedError, match="it was not prepared"):
        read_manifest(source)
    good = (out / MANIFEST).read_text()
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "version None"),
        (good.replace(f'"version": {FORMAT_VERSION}', '"version": 99'), "version 99, this program"),
        (good.replace('"token_bytes": 2', '"token_bytes": 3'), "is damaged"),
        (good.replace('"records"', '"recorded"'), "is damaged"),
    ):
        (out / MANIFEST).write_text(text)
        with pytest.raises(PreparedError, match=message):
            PreparedDocuments(out, "train")
    (out / MANIFEST).write_text(good)
    path = out / "00002.train.npy"
    index = path.read_bytes()
    for damaged in (index[:-4], (out / "00003.train.npy").read_bytes(), b""):
        path.write_bytes(damaged)
        with pytest.raises(PreparedError, match=r"00002\.train\.npy is damaged.*\(--overwrite\)"):
            PreparedDocuments(out, "train")
    path.unlink()
    with pytest.raises(PreparedError, match=r"00002\.train\.npy is missing"):
        PreparedDocuments(out, "train")
    path.write_bytes(index)
    # A shard in the place of another that has as many documents, of other lengths.
    records = [shard["train"]["records"] for shard in json.loads(good)["shards"]]
    one = next(n for n in range(8) if records[n] in records[:n])
    path = out / f"{one:05d}.train.array_record"
    shard = path.read_bytes()
    path.write_bytes((out / f"{records.index(records[one]):05d}.train.array_record").read_bytes())
    documents = PreparedDocuments(out, "train")
    with pytest.raises(PreparedError, match=r"is damaged: it has \d+ tokens, the index says \d+"):
        [documents.read(i, 0, int(n)) for i, n in enumerate(documents.lengths)]
    path.write_bytes(shard)
    (out / "00004.train.array_record").unlink()
    with pytest.raises(PreparedError, match=r"00004\.train\.array_record is missing"):
        PreparedDocuments(out, "train").read(0, 0, 1)


def test_ids_beyond_the_number_of_entries_are_kept_whole(tmp_path):
    """In a vocabulary with holes, ids are larger than there are entries."""
    tokenizer = json.loads(files()["tokenizer.json"])
    tokenizer["model"]["vocab"]["far"] = 70_000
    path = write_jsonl(tmp_path / "a.jsonl", [{"tokens": [5, 70_000]}, {"tokens": [70_001]}])
    task = job(path, content="tokens", validation=0.0, max_bad=0.5)
    task = dataclasses.replace(task, tokenizer_files={"tokenizer.json": json.dumps(tokenizer)})
    assert prepare(task, tmp_path / "out", processes=1)["rows"]["bad"] == {"id_out_of_range": 1}
    assert PreparedDocuments(tmp_path / "out", "train").read(0, 0, 2)[0].tolist() == [5, 70_000]


EIO = "pread() failed: Input/output error; reading a.array_record; at byte 7"


@pytest.fixture
def failing(source, tmp_path, monkeypatch):
    """A prepared folder, and how often (and with what) its next reads fail."""
    prepare(job(source), tmp_path / "out", processes=1)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    faults, read = [], shards.Shard.read

    def failing(self, key):
        if faults:
            raise RuntimeError(faults.pop())
        return read(self, key)

    monkeypatch.setattr(shards.Shard, "read", failing)
    return tmp_path / "out", faults


def test_reads_that_fail_for_a_while_are_tried_again(failing):
    folder, faults = failing
    cfg = DataConfig(sources=(str(folder),), row_length=16)
    rows = load_corpus(cfg, TOKENIZER, SPECIAL).training_rows(cfg, 20, 0)
    calm = [b.tokens for b in batches(rows, rows_per_step=4, first_step=0)]
    faults += [EIO] * 3
    shaken = [b.tokens for b in batches(rows, rows_per_step=4, first_step=0)]
    np.testing.assert_array_equal(np.stack(shaken), np.stack(calm))
    assert not faults


def test_reads_that_keep_failing_stop_with_the_reason_and_damage_at_once(failing, tmp_path):
    folder, faults = failing
    cfg = DataConfig(sources=(str(folder),), row_length=16, retry_seconds=0.1)
    documents = load_corpus(cfg, TOKENIZER, SPECIAL).sources[0].train
    faults += [EIO] * 1000
    with pytest.raises(retry.StorageError, match=r"reading record 0 .*: pread\(\) failed"):
        documents.read(0, 0, 1)
    faults[:] = ["Corrupted Riegeli/records file: chunk data hash mismatch"] * 2
    with pytest.raises(PreparedError, match="record 0 of the train split is damaged: Corrupted"):
        documents.read(0, 0, 1)
    assert len(faults) == 1
    # A folder that is away for a while: it is opened anew.
    faults[:] = [EIO]
    folder.rename(tmp_path / "away")
    with pytest.raises(retry.StorageError, match="No such file"):
        documents.read(0, 0, 1)
    (tmp_path / "away").rename(folder)
    faults.clear()
    assert documents.read(0, 0, 1)[0].tolist() == [SPECIAL.bos]


def test_shards_beyond_the_number_of_open_files_are_read_and_files_are_left(tmp_path, monkeypatch):
    """By two threads, as the loader does; and from a folder whose name is not UTF-8."""
    opened = len(os.listdir("/proc/self/fd"))
    rows = texts(opened + 60)
    (tmp_path / "in").mkdir()
    FORMATS["text"](tmp_path / "in", rows)
    monkeypatch.setattr(sources, "UNIT_ROWS", 1)
    out = tmp_path / os.fsdecode(b"\xe9")
    prepare(job(tmp_path / "in", validation=0.0), out, processes=1)
    documents = PreparedDocuments(out, "train", retry_seconds=0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 40, hard))

    def read(i):
        return TOKENIZER.decode(documents.read(i, 1, int(documents.lengths[i]) - 1)[0].tolist())

    try:
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(read, range(len(rows)))) == sorted(rows)
        bound = (opened + 40) // shards.SHARE
        assert len(os.listdir("/proc/self/fd")) <= opened + bound + 3
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.fixture
def shard(tmp_path) -> shards.Shard:
    writer = ArrayRecordWriter(str(tmp_path / "x.array_record"), "group_size:1,zstd:3")
    for i in range(300):
        writer.write(f"{i:05d}".encode() * 40)
    writer.close()
    return shards.Shard(tmp_path / "x.array_record", 300)


def test_threads_share_a_shard(shard):
    opened = []

    class Interrupted:
        """A reader under which other threads come to run."""

        def __init__(self):
            self._reader = ArrayRecordReader(str(shard.path))
            opened.append(self)

        def seek(self, number):
            self._reader.seek(number)
            time.sleep(1e-4)

        def read(self):
            return self._reader.read()

    shard.open = Interrupted
    numbers = np.random.default_rng(0).integers(0, 300, 400).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [int(r[:5]) for r in pool.map(shard.read, numbers)] == numbers
    assert len(opened) == 1


def test_a_damaged_record_does_not_make_others_unreadable(shard):
    data = bytearray(shard.path.read_bytes())
    data[data.find(b"00007") + 3] ^= 1
    shard.path.write_bytes(data)
    with pytest.raises(RuntimeError, match="hash mismatch"):
        shard.read(7)
    assert shard.read(8)[:5] == b"00008"


def test_a_system_that_allows_no_more_files_is_no_error(monkeypatch):
    def refuse(*_):
        raise ValueError("current limit exceeds maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda which: (256, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    raise_open_files_limit()


def test_commands_may_open_as_many_files_as_the_system_allows(monkeypatch):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    seen = types.SimpleNamespace(main=lambda arguments: open_files_limit())
    monkeypatch.setitem(sys.modules, "a_command", seen)
    monkeypatch.setitem(cli.COMMANDS, "show", ("a_command", ""))
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft // 2, hard))
        assert cli.main(["show"]) == (ENOUGH_FILES if hard < 0 else min(hard, ENOUGH_FILES))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("name", [MANIFEST, "00003.validation.npy", "00002.train.array_record"])
def test_a_start_waits_for_storage_and_not_for_what_is_not_there(
    name, source, tmp_path, monkeypatch
):
    """Manifest and index are read, shards are looked for, when a run starts."""
    prepare(job(source), tmp_path / "out", processes=1)
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    faults, open_, stat = [], io.open, Path.stat

    def fail(path):
        if Path(path).name == name and faults:
            raise OSError(faults.pop(), "Input/output error", str(path))

    monkeypatch.setattr(io, "open", lambda file, *a, **k: fail(file) or open_(file, *a, **k))
    monkeypatch.setattr(Path, "stat", lambda self, **k: fail(self) or stat(self, **k))
    cfg = DataConfig(sources=(str(tmp_path / "out"),), row_length=16)
    calm = load_corpus(cfg, TOKENIZER, SPECIAL).sources[0].train.ids
    faults += [errno.EIO] * 2
    np.testing.assert_array_equal(load_corpus(cfg, TOKENIZER, SPECIAL).sources[0].train.ids, calm)
    assert not faults
    faults += [errno.EIO] * 1000
    cfg = dataclasses.replace(cfg, retry_seconds=0.1)
    with pytest.raises(retry.StorageError, match=rf"{name} failed.*Input/output error"):
        load_corpus(cfg, TOKENIZER, SPECIAL)
    faults[:] = [errno.ENOENT] * 3
    with pytest.raises(PreparedError, match="is missing|was not prepared|was stopped"):
        load_corpus(cfg, TOKENIZER, SPECIAL)
    assert len(faults) == 2


def test_data_of_another_tokenizer_is_refused(source, tmp_path):
    prepare(job(source), tmp_path / "out", processes=1)
    cfg = DataConfig(sources=(str(tmp_path / "out"),), row_length=16)
    assert load_corpus(cfg, TOKENIZER, SPECIAL).sources[0].train.ids.size
    other = json.loads(TOKENIZER.to_str())
    other["added_tokens"][3]["content"] = "<roll>"
    with pytest.raises(PreparedError, match="was tokenized by another tokenizer"):
        load_corpus(cfg, Tokenizer.from_str(json.dumps(other)), SPECIAL)
    with pytest.raises(PreparedError, match="was prepared with special tokens"):
        load_corpus(cfg, TOKENIZER, dataclasses.replace(SPECIAL, pad=3))


def test_a_digest_tells_documents_apart_and_not_where_they_are(tmp_path):
    """Even those of the same names and lengths, prepared or in memory."""

    def digests(name: str, word: str) -> list[str]:
        texts = [f"alpha {word} beta {i}" for i in range(20)]
        write_jsonl(tmp_path / "in.jsonl", [{"text": t} for t in texts])
        prepare(job(tmp_path / "in.jsonl"), tmp_path / name, processes=1)
        cfg = DataConfig(sources=(str(tmp_path / name),), row_length=16)
        documents = [Document(i, f"{i}.txt", text) for i, text in enumerate(texts)]
        in_memory = tokenize(documents, TOKENIZER, eos=SPECIAL.eos, bos=SPECIAL.bos)
        return [*load_corpus(cfg, TOKENIZER, SPECIAL).digests().values(), in_memory.digest]

    first, moved, other = digests("a", "gamma"), digests("b", "gamma"), digests("c", "delta")
    assert first == moved and len({*first, *other}) == 6


@pytest.mark.parametrize("packing", ["concat", "best_fit"])
def test_any_number_of_processes_goes_on_with_the_same_documents(packing, source, tmp_path):
    """Three steps by one process, three by four, the rest by two: as one alone would read them."""
    prepare(job(source), tmp_path / "a", processes=1)
    write_jsonl(tmp_path / "b.jsonl", [{"text": t * 3} for t in texts(25)])
    prepare(job(tmp_path / "b.jsonl"), tmp_path / "b", processes=1)
    cfg = DataConfig(
        sources=(str(tmp_path / "a"), str(tmp_path / "b")),
        weights=(1.0, 2.0),
        packing=packing,
        row_length=64,
        pad_multiple=4,
        long_documents="split",
    )

    def read_by(processes, first, stop):
        rows = load_corpus(cfg, TOKENIZER, SPECIAL).training_rows(cfg, 8 * 40, 7)
        parts = [
            batches(rows, rows_per_step=8, first_step=first, share=share)
            for share in np.split(np.arange(8), processes)
        ]
        for _ in range(first, stop):
            yield np.concatenate([next(p).tokens for p in parts])

    alone = np.stack(list(read_by(1, 0, 40)))
    pieced = [*read_by(1, 0, 3), *read_by(4, 3, 6), *read_by(2, 6, 40)]
    np.testing.assert_array_equal(np.stack(pieced), alone)
