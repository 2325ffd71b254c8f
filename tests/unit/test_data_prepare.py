"""Preparation: the same bytes however the work is done, and what stops it."""

import dataclasses
import errno
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from llada2_jax import retry
from llada2_jax.data import folder_lock, sources
from llada2_jax.data import prepare as preparing
from llada2_jax.data.folder_lock import LockedError
from llada2_jax.data.prepare import (
    MANIFEST,
    PLAN,
    PrepareError,
    prepare,
)
from llada2_jax.data.prepared import PreparedDocuments, PreparedError, read_manifest
from llada2_jax.data.sources import SourceError
from llada2_jax.errors import UsageError
from tests.data_helpers import (
    FORMATS,
    SPECIAL,
    contents,
    documents_of,
    eight_units,
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
    return eight_units(tmp_path / "in", monkeypatch)


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
