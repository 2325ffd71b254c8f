"""Preparation: the same bytes however the work is done, what stops it, and what is read back."""

import concurrent.futures
import dataclasses
import errno
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
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
from llada2_jax.data import folder_lock, shards, sources
from llada2_jax.data import prepare as preparing
from llada2_jax.data.corpus import load_corpus
from llada2_jax.data.documents import Document
from llada2_jax.data.examples import Example, decode_record, encode_record
from llada2_jax.data.folder_lock import LockedError
from llada2_jax.data.loader import batches
from llada2_jax.data.packing import tokenize
from llada2_jax.data.prepare import (
    FORMAT_VERSION,
    MANIFEST,
    PLAN,
    PrepareError,
    prepare,
)
from llada2_jax.data.prepared import PreparedDocuments, PreparedError, read_manifest
from llada2_jax.data.sources import SourceError
from llada2_jax.errors import UsageError
from llada2_jax.files import ENOUGH_FILES, open_files_limit, raise_open_files_limit
from tests.data_helpers import (
    FORMATS,
    SPECIAL,
    contents,
    documents_of,
    files,
    job,
    texts,
    write_jsonl,
)
from tests.processes import ROOT

TOKENIZER = Tokenizer.from_str(files()["tokenizer.json"])


# -------------------------------------------------------------------------------- preparation


@pytest.fixture
def source(tmp_path, monkeypatch) -> Path:
    """A folder of one file that falls into eight units."""
    (tmp_path / "in").mkdir()
    path = write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": t} for t in texts(60)])
    monkeypatch.setattr(sources, "UNIT_BYTES", -(-path.stat().st_size // 8))
    return tmp_path / "in"


def test_output_does_not_depend_on_the_number_of_processes(source, tmp_path):
    one = prepare(job(source), tmp_path / "one", processes=1)
    two = prepare(job(source), tmp_path / "two", processes=2)
    assert multiprocessing.active_children() == []
    assert one == two and contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(one["shards"]) == 8
    assert one["rows"] == {"read": 60, "bad": {}}
    total = {k: sum(one["splits"][s][k] for s in one["splits"]) for k in ("documents", "tokens")}
    assert total["documents"] == 60
    assert total["tokens"] == sum(len(w) for _, w in documents_of(tmp_path / "one"))


def test_a_stopped_preparation_goes_on_where_it_stopped(source, tmp_path, monkeypatch):
    whole = prepare(job(source), tmp_path / "whole", processes=1)
    written = []

    def stopping(units, reports):
        for report in reports:
            written.append(report)
            if len(written) == 3:
                raise KeyboardInterrupt
            yield report

    with pytest.raises(KeyboardInterrupt):
        prepare(job(source), tmp_path / "out", processes=1, progress=stopping)
    with pytest.raises(PreparedError, match="its preparation was stopped: run it again"):
        read_manifest(tmp_path / "out")
    # A shard that a kill left half written is written anew.
    (tmp_path / "out" / ".00003.train.array_record.tmp").write_bytes(b"torn")
    left = []

    def watching(units, reports):
        left.extend(units)
        yield from reports

    assert prepare(job(source), tmp_path / "out", processes=1, progress=watching) == whole
    assert len(left) == 5
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    # And once more: nothing is left to do.
    left.clear()
    assert prepare(job(source), tmp_path / "out", processes=1, progress=watching) == whole
    assert left == []


KILLED = """
import sys, time
from llada2_jax.data import prepare as preparing, sources
from tests.data_helpers import job

def slowly(self, spec, unit, read=sources._JsonLines.read):
    for row in read(self, spec, unit):
        time.sleep(0.1)
        yield row

sources.UNIT_BYTES = int(sys.argv[3])
sources._JsonLines.read = slowly
if __name__ == "__main__":
    preparing.prepare(job(sys.argv[1]), sys.argv[2], processes=2)
"""


@pytest.mark.skipif(not Path("/proc").exists(), reason="this system has no /proc")
def test_workers_end_with_a_process_that_was_killed_and_its_work_goes_on(
    source, tmp_path, monkeypatch
):
    whole = prepare(job(source), tmp_path / "whole", processes=1)
    out = tmp_path / "out"
    (tmp_path / "killed.py").write_text(KILLED)
    command = [sys.executable, tmp_path / "killed.py", source, out, str(sources.UNIT_BYTES)]
    preparation = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)})
    while not list(out.glob("0*.json")):
        assert preparation.poll() is None
        time.sleep(0.02)

    def workers():  # those that are alive
        lines = {int(p.parent.name): p.read_bytes() for p in Path("/proc").glob("[0-9]*/cmdline")}
        return {i for i in children if b"spawn_main" in lines.get(i, b"")}

    def refused():
        with monkeypatch.context() as patched, pytest.raises(LockedError, match="out is being wri"):
            patched.setattr(folder_lock, "WAIT_SECONDS", 0.0)
            prepare(job(source), out, processes=1, overwrite=True)

    listed = Path(f"/proc/{preparation.pid}/task/{preparation.pid}/children").read_text()
    children = set(map(int, listed.split()))
    assert len(children := workers()) == 2
    refused()
    for worker in children:
        os.kill(worker, signal.SIGSTOP)
    preparation.kill()
    preparation.wait()
    refused()  # a worker that lives could write
    for worker in children:
        os.kill(worker, signal.SIGCONT)
    left = []

    def watching(units, reports):
        left.extend(units)
        yield from reports

    assert prepare(job(source), out, processes=1, progress=watching) == whole
    assert not workers() and 0 < len(left) < 8
    assert contents(out) == contents(tmp_path / "whole")


def test_overwriting_removes_nothing_before_the_job_is_known_to_be_possible(source, tmp_path):
    out = tmp_path / "out"
    prepare(job(source), out, processes=1)
    before = contents(out)
    for wrong, error in (
        (job(tmp_path / "mistyped"), SourceError),
        (job(source, content="chat", template="{% broken"), ValueError),
        (job(source / "a.jsonl", source={"format": "parquet"}), SourceError),
    ):
        with pytest.raises(error):
            prepare(wrong, out, processes=1, overwrite=True)
        assert contents(out) == before
    prepare(job(source, bos=False), out, processes=1, overwrite=True)
    assert contents(out) != before


@pytest.mark.parametrize("text", ["{}", "[]", "{", '{"job": {}}'])
def test_what_an_earlier_run_left_damaged_is_named(text, source, tmp_path):
    prepare(job(source), tmp_path / "out", processes=1)
    for name in (PLAN, "00003.json"):
        good = (tmp_path / "out" / name).read_text()
        (tmp_path / "out" / name).write_text(text)
        with pytest.raises(PrepareError, match=rf"{name} is damaged: .*--overwrite"):
            prepare(job(source), tmp_path / "out", processes=1)
        (tmp_path / "out" / name).write_text(good)


@pytest.mark.parametrize(
    "field", [{"max_bad": float("nan")}, {"max_bad": -1}, {"validation": 250}, {"max_bad": 1.5}]
)
def test_shares_beyond_the_whole_are_refused(field):
    with pytest.raises(UsageError, match=r"(max_bad_fraction|validation_percent)=.* from 0 to 1"):
        job("a.jsonl", **field)


@pytest.mark.parametrize("kind", FORMATS)
def test_storage_that_fails_for_a_while_changes_nothing(kind, tmp_path, monkeypatch, caplog):
    """In a unit's middle, where rows were written already, and while the source is listed."""
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    (tmp_path / "in").mkdir()
    FORMATS[kind](tmp_path / "in", texts(40))
    whole = prepare(job(tmp_path / "in"), tmp_path / "whole", processes=1)
    form = sources.FORMATS[whole["source"]["format"]]
    faults, rows_of, plan_of = [5, 3, -1], form.read, form.plan

    def failing(self, spec, unit):
        for i, row in enumerate(rows_of(spec, unit)):
            if faults and i == faults[-1]:
                faults.pop()
                raise OSError(errno.EIO, "Input/output error")
            yield row

    def failing_once(self, spec):
        if faults[-1] == -1:
            faults.pop()
            raise OSError(errno.EIO, "Input/output error")
        return plan_of(spec)

    monkeypatch.setattr(type(form), "read", failing)
    monkeypatch.setattr(type(form), "plan", failing_once)
    with pytest.raises(retry.StorageError, match="reading .* failed: .*Input/output error"):
        prepare(job(tmp_path / "in"), tmp_path / "out", processes=1)
    with pytest.raises(retry.StorageError, match="preparing unit 0 .* failed: .*Input/output"):
        prepare(job(tmp_path / "in"), tmp_path / "out", processes=1)
    faults += [6, 3, -1]
    patient = dataclasses.replace(job(tmp_path / "in"), retry_seconds=9)
    assert prepare(patient, tmp_path / "out", processes=1) == whole and not faults
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert caplog.text.count("trying again") == 4


def test_own_files_that_storage_refuses_for_a_while_are_written(source, tmp_path, monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)
    faults, write = [], preparing.write_json

    def failing(path, value):
        if path.name not in faults:
            faults.append(path.name)
            raise OSError(errno.EIO, "Input/output error")
        write(path, value)

    whole = prepare(job(source), tmp_path / "whole", processes=1)
    monkeypatch.setattr(preparing, "write_json", failing)
    with pytest.raises(retry.StorageError, match="writing .*out failed: .*Input/output"):
        prepare(job(source), tmp_path / "out", processes=1)
    faults.clear()
    patient = dataclasses.replace(job(source), retry_seconds=9)
    assert prepare(patient, tmp_path / "out", processes=1) == whole
    assert {PLAN, MANIFEST, "00000.json"} <= set(faults)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_an_output_within_the_source_is_refused(source):
    for out in (source, source / "out", source / "a" / ".." / "out"):
        with pytest.raises(PrepareError, match="lies in the source"):
            prepare(job(source), out, processes=1)
    assert not (source / "out").exists()


def test_overwriting_removes_nothing_but_what_was_prepared(source, tmp_path):
    out = tmp_path / "out"
    prepare(job(source), out, processes=1)
    (out / "raw").mkdir()
    write_jsonl(out / "raw" / "a.jsonl", [{"text": "x"}])
    before = contents(out)
    for inside in (out / "raw", out / "raw" / "a.jsonl", tmp_path / "in" / ".." / "out" / "raw"):
        with pytest.raises(PrepareError, match="the source .* lies in .*: name another folder"):
            prepare(job(inside), out, processes=1, overwrite=True)
    (out / "raw").rename(out / "tokenizer" / "raw")
    for left in ("tokenizer/raw", "notes.txt", "00000.json.orig", "00000.train.array_record.bak"):
        if left != "tokenizer/raw":
            (out / left).write_text("mine")
        before = contents(out)
        with pytest.raises(PrepareError, match=f"{left.split('/')[0]} is not of the prepared data"):
            prepare(job(source, bos=False), out, processes=1, overwrite=True)
        assert contents(out) == before
        (out / left).rename(tmp_path / left.replace("/", "-"))
    prepare(job(source), out, processes=1, overwrite=True)
    prepare(job(source), tmp_path / "whole", processes=1)
    assert contents(out) == contents(tmp_path / "whole")


@pytest.mark.parametrize("last", [PLAN, "tokenizer"])
def test_an_overwrite_that_is_killed_leaves_a_folder_to_go_on_with(
    last, source, tmp_path, monkeypatch
):
    """At the end, where little but the plan and the tokenizer is left."""
    out = tmp_path / "out"
    prepare(job(source), tmp_path / "whole", processes=1)
    prepare(job(source), out, processes=1)
    with monkeypatch.context() as patch:

        def killed(path, *args, **kwargs):
            if path.name == last:
                raise KeyboardInterrupt
            return (unlink if path.is_file() else rmtree)(path, *args, **kwargs)

        unlink, rmtree = Path.unlink, shutil.rmtree
        patch.setattr(Path, "unlink", killed)
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(job(source), out, processes=1, overwrite=True)
    prepare(job(source), out, processes=1)
    assert contents(out) == contents(tmp_path / "whole")


def test_what_nfs_keeps_of_removed_files_is_nobodys(source, tmp_path):
    out = tmp_path / "out"
    prepare(job(source), out, processes=1)
    (out / ".nfs000000000012ab").touch()
    prepare(job(source, bos=False), out, processes=1, overwrite=True)


def test_a_folder_that_another_one_begins_is_locked_and_not_somebody_elses(
    source, tmp_path, monkeypatch
):
    monkeypatch.setattr(folder_lock, "WAIT_SECONDS", 0.0)
    out = tmp_path / "out"
    out.mkdir()
    with folder_lock.lock_folder(out):
        (out / "00000.train.array_record").touch()
        with pytest.raises(LockedError, match="is being written by another process"):
            prepare(job(source), out, processes=1)


def test_a_linked_output_is_overwritten(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    prepare(job(source), tmp_path / "out", processes=1)
    before = contents(tmp_path / "real")
    prepare(job(source, bos=False), tmp_path / "out", processes=1, overwrite=True)
    assert contents(tmp_path / "out") != before


def test_a_plan_whose_writing_was_interrupted_is_no_other_file(source, tmp_path):
    out = tmp_path / "out"
    (out / "tokenizer").mkdir(parents=True)
    (out / f".{PLAN}.123").write_text("{")
    prepare(job(source), out, processes=1)
    prepare(job(source), tmp_path / "whole", processes=1)
    assert contents(out) == contents(tmp_path / "whole")
    torn = tmp_path / "torn"
    torn.mkdir()
    (torn / f".{PLAN}.123").write_text("{")
    prepare(job(source), torn, processes=1, overwrite=True)
    assert contents(torn) == contents(tmp_path / "whole")


@pytest.mark.parametrize("kind", FORMATS)
def test_a_source_changed_in_place_is_refused(kind, tmp_path):
    (tmp_path / "in").mkdir()
    FORMATS[kind](tmp_path / "in", texts(9))
    prepare(job(tmp_path / "in"), tmp_path / "out", processes=1)
    prepare(job(tmp_path / "in"), tmp_path / "out", processes=1)
    file = max(p for p in (tmp_path / "in").rglob("*") if p.is_file())
    later = file.stat().st_mtime_ns + 1_000
    os.utime(file, ns=(later, later))  # as rewriting it with as many bytes would
    with pytest.raises(PrepareError, match="another files of the source .*times of change"):
        prepare(job(tmp_path / "in"), tmp_path / "out", processes=1)


def test_a_report_is_on_disk_after_what_it_reports(source, tmp_path, monkeypatch):
    synced, fsync = [], os.fsync

    def recording(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recording)
    prepare(job(source), tmp_path / "out", processes=1)
    names = [name.rsplit(".", 1)[0] if name.startswith(".") else name for name in synced]
    for unit in range(8):
        shards = [f".{unit:05d}.{s}.{x}" for s in preparing.SPLITS for x in ("array_record", "npy")]
        report = names.index(f".{unit:05d}.json")
        assert all(name in names[:report] for name in shards)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(names[: names.index(f".{PLAN}")])


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk_is_an_os_error_and_what_is_done_is_kept(source, tmp_path):
    out = tmp_path / "out"
    whole = prepare(job(source), out, processes=1)
    before = contents(out)
    for left in (out / "00005.json", out / "00005.train.array_record"):
        left.unlink()
    (out / ".00005.train.array_record.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"00005\.train\.array_record: .*No space left on device"):
        prepare(job(source), out, processes=1)
    (out / ".00005.train.array_record.tmp").unlink()
    assert prepare(job(source), out, processes=1) == whole and contents(out) == before


def test_a_folder_of_another_job_is_left_alone(source, tmp_path):
    prepare(job(source), tmp_path / "out", processes=1)
    before = contents(tmp_path / "out")
    with pytest.raises(PrepareError, match="was begun with another encode"):
        prepare(job(source, bos=False), tmp_path / "out", processes=1)
    write_jsonl(source / "b.jsonl", [{"text": "more"}])
    with pytest.raises(PrepareError, match="was begun with another files of the source"):
        prepare(job(source), tmp_path / "out", processes=1)
    assert contents(tmp_path / "out") == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(PrepareError, match="other holds other files"):
        prepare(job(source), tmp_path / "other", processes=1)
    with pytest.raises(PrepareError, match=f"other holds other files and no {PLAN}"):
        prepare(job(source), tmp_path / "other", processes=1, overwrite=True)
    assert contents(tmp_path / "other") == {"notes.txt": b""}


def test_a_folder_begun_under_another_built_in_template_is_refused(tmp_path, monkeypatch):
    turns = [{"role": "user", "content": "alpha"}, {"role": "assistant", "content": "beta"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": turns}])
    task = job(path, content="chat", template="llada2")
    prepare(task, tmp_path / "out", processes=1)
    prepare(task, tmp_path / "out", processes=1)
    monkeypatch.setattr(preparing, "LLADA2_TEMPLATE", preparing.LLADA2_TEMPLATE + " ")
    with pytest.raises(PrepareError, match="was begun with another template_sha256"):
        prepare(task, tmp_path / "out", processes=1)


def test_long_documents_are_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "CHUNK_TOKENS", 16)
    rows = [" ".join(texts(30)), "short", " ".join(texts(50))]
    write_jsonl(tmp_path / "a.jsonl", [{"text": t} for t in rows])
    manifest = prepare(job(tmp_path / "a.jsonl", validation=0.0), tmp_path / "out", processes=1)
    assert manifest["splits"]["train"]["records"] > 30
    documents = PreparedDocuments(tmp_path / "out", "train")
    for i, text in enumerate(rows):
        length = int(documents.lengths[i])
        whole, weights = documents.read(i, 0, length)
        assert TOKENIZER.decode(whole[1:-1].tolist()) == text and weights.sum() == length - 1
        for start, stop in ((0, 1), (0, length), (15, 17), (16, 32), (length - 1, length)):
            if stop <= length:
                tokens, loss = documents.read(i, start, stop)
                np.testing.assert_array_equal(tokens, whole[start:stop])
                np.testing.assert_array_equal(loss, weights[start:stop])


# ----------------------------------------------------------------------------------- bad rows

BAD = {
    "not_json": "{broken",
    "not_utf8": '{"text": "\\ud800"}',
    "wrong_type": {"text": 3},
    "empty": {"text": " \n"},
    "mask_token": {"text": "a <|mask|> b"},
}


@pytest.mark.parametrize("unit_bytes", [400, sources.UNIT_BYTES])
def test_bad_rows_are_counted_by_kind_and_named(unit_bytes, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "UNIT_BYTES", unit_bytes)
    rows: list = [{"text": t} for t in texts(95)]
    for place, row in zip((3, 20, 40, 60, 80), BAD.values(), strict=True):
        rows.insert(place, row)
    rows[30:30] = ["", " "]  # lines that are no rows
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    read_from = []
    lines = sources._JsonLines._lines

    def recording(self, unit):
        read_from.append(unit.start)
        return lines(self, unit)

    monkeypatch.setattr(sources._JsonLines, "_lines", recording)
    manifest = prepare(job(path, max_bad=0.05), tmp_path / "out", processes=1)
    assert manifest["rows"] == {"read": 100, "bad": dict.fromkeys(sorted(BAD), 1)}
    places = {e["kind"]: e["place"] for e in manifest["bad_examples"]}
    assert places == {
        kind: f"{path}:{line}" for kind, line in zip(BAD, (4, 21, 43, 63, 83), strict=True)
    }
    assert len(read_from) == len(set(read_from)), "a unit is read again to find its lines"
    assert len(documents_of(tmp_path / "out")) == 95


def test_too_many_bad_rows_stop_the_run_and_can_be_allowed_later(source, tmp_path):
    rows = (source / "a.jsonl").read_text().splitlines()
    rows[17] = "[" + rows[17][1:]
    rows[33] = "[" + rows[33][1:]
    (source / "a.jsonl").write_text("\n".join(rows) + "\n")
    with pytest.raises(PrepareError, match=r"2 of 60 rows are bad.*0\.03.*2 not_json") as stopped:
        prepare(job(source, max_bad=0.03), tmp_path / "out", processes=1)
    assert f"{source / 'a.jsonl'}:18: " in str(stopped.value)
    assert not (tmp_path / "out" / MANIFEST).exists()
    # None allowed: the first one stops the run, in a worker as well.
    with pytest.raises(PrepareError, match=r"1 of \d+ rows are bad"):
        prepare(job(source), tmp_path / "none", processes=2)
    # What is done is kept, and another limit is no other job.
    manifest = prepare(job(source, max_bad=0.04), tmp_path / "out", processes=1)
    assert manifest["rows"]["bad"] == {"not_json": 2}


def test_bad_rows_are_judged_over_all_units(tmp_path, monkeypatch):
    """Two in a unit of twelve rows are few of 600; many in all units stop the run at once."""
    monkeypatch.setattr(preparing, "ROWS_TO_JUDGE", 50)
    (tmp_path / "in").mkdir()
    write_jsonl(tmp_path / "in" / "a.jsonl", [{"text": t} for t in texts(10)] + ["broken"] * 2)
    rows = [{"text": t} for t in texts(588)]
    size = write_jsonl(tmp_path / "in" / "b.jsonl", rows).stat().st_size
    monkeypatch.setattr(sources, "UNIT_BYTES", -(-size // 8))
    manifest = prepare(job(tmp_path / "in", max_bad=0.005), tmp_path / "few", processes=1)
    assert manifest["rows"] == {"read": 600, "bad": {"not_json": 2}}
    write_jsonl(tmp_path / "in" / "b.jsonl", [r if i % 9 else "[" for i, r in enumerate(rows)])
    with pytest.raises(PrepareError, match=r"b\.jsonl:1: |a\.jsonl:11: "):
        prepare(job(tmp_path / "in", max_bad=0.005), tmp_path / "many", processes=1)
    assert len(list((tmp_path / "many").glob("0*.json"))) <= 3


def test_a_unit_full_of_bad_rows_stops_before_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(preparing, "ROWS_TO_JUDGE", 100)
    path = write_jsonl(tmp_path / "a.jsonl", ["broken"] * 1000)
    with pytest.raises(PrepareError, match=r"51 of 51 rows are bad[^$]*a\.jsonl:1: "):
        prepare(job(path, max_bad=0.1), tmp_path / "out", processes=1)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"tokens": [5, 300]}, "id_out_of_range"),
        ({"tokens": [5, -1]}, "id_out_of_range"),
        ({"tokens": [10**30]}, "wrong_type"),
        ({"tokens": [5, 0]}, "mask_token"),
        ({"tokens": []}, "empty"),
        ({"tokens": [1.5]}, "wrong_type"),
        ({"tokens": "5"}, "wrong_type"),
        ({"tokens": [True]}, "wrong_type"),
        ({"tokens": [5], "loss_mask": [1, 1]}, "wrong_type"),
        ({"tokens": [5], "loss_mask": [float("nan")]}, "wrong_type"),
        ({"tokens": [5], "loss_mask": [0]}, "no_assistant_turn"),
        ({}, "wrong_type"),
    ],
)
def test_bad_rows_of_ids(row, kind, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [row])
    with pytest.raises(PrepareError, match=f"1 {kind}"):
        prepare(job(path, content="tokens"), tmp_path / "out", processes=1)


def test_rows_of_ids_are_taken_as_they_are(tmp_path):
    rows = [{"tokens": [2, 7, 296, 1]}, {"tokens": [9, 8, 7], "loss_mask": [0, 0.5, 1]}]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    job_ = job(path, content="tokens", validation=0.0)
    manifest = prepare(job_, tmp_path / "out", processes=1)
    assert manifest["splits"]["train"]["weighted"] is True
    assert manifest["splits"]["validation"]["documents"] == 0
    documents = PreparedDocuments(tmp_path / "out", "train")
    got = [tuple(x.tolist() for x in documents.read(i, 0, n)) for i, n in ((0, 4), (1, 3))]
    assert got == [([2, 7, 296, 1], [0, 1, 1, 1]), ([9, 8, 7], [0, 0.5, 1])]
    assert documents.first_supervised.tolist() == [1, 1]
    assert documents.supervised_end.tolist() == [4, 3]


def test_prompts_stand_before_and_are_not_learned(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"question": "alpha?", "answer": "beta"}])
    task = job(path, field="answer", prompt_field="question", validation=0.0)
    prepare(task, tmp_path / "out", processes=1)
    documents = PreparedDocuments(tmp_path / "out", "train")
    tokens, weights = documents.read(0, 0, int(documents.lengths[0]))
    assert TOKENIZER.decode(tokens[weights == 0].tolist()) == "alpha?"
    assert TOKENIZER.decode(tokens[weights == 1].tolist()) == "beta"
    assert tokens[0] == SPECIAL.bos and weights[-1] == 1 and weights[0] == 0
    missing = job(path, field="answer", prompt_field="prompt")
    with pytest.raises(PrepareError, match="1 wrong_type"):
        prepare(missing, tmp_path / "missing", processes=1)


# ------------------------------------------------------------------------------- reading back


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
