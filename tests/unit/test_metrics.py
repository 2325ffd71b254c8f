"""The record of a run: whole lines, in order, of the surviving steps, whatever storage does."""

import json
import os
import struct
import sys
import time
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada2_jax import metrics, retry
from llada2_jax.config import ConfigError
from llada2_jax.metrics import MetricLogger, read_metrics
from llada2_jax.retry import StorageError, with_retries


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.01)


def open_logger(workdir, first_step=0, **options) -> MetricLogger:
    options = {"retry_seconds": 0.2} | options
    return MetricLogger(
        workdir, total_steps=9, first_step=first_step, tokens_per_step=4, label="", **options
    )


def log_steps(logger, steps) -> None:
    for step in steps:
        logger.write(step, "train", "ar", {"loss": 1 / step})


def steps_of(workdir) -> list[int]:
    return [line["step"] for line in read_metrics(workdir)]


def test_a_resumed_run_forgets_the_steps_it_takes_again(tmp_path):
    logger = open_logger(tmp_path)
    log_steps(logger, [1, 2, 3, 4])
    logger.close()
    with (tmp_path / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "ki\xff')  # torn by a crash
    logger = open_logger(tmp_path, first_step=2)
    log_steps(logger, [3])
    assert steps_of(tmp_path) == [1, 2, 3]
    logger.cut_back(1)  # a rollback
    log_steps(logger, [4])
    logger.sync()
    logger.close()
    assert steps_of(tmp_path) == [1, 4]
    assert all(json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines())


def test_a_line_that_is_cut_short_is_written_again(tmp_path, monkeypatch):
    logger, write = open_logger(tmp_path), os.pwrite
    full = iter([3, 2])  # a disk that takes three bytes, then two, then none for a while

    def short(file, data, offset):
        for size in full:
            return write(file, data[:size], offset)
        monkeypatch.setattr(os, "pwrite", write)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", short)
    log_steps(logger, [1, 2])
    logger.close()
    assert steps_of(tmp_path) == [1, 2]
    assert (tmp_path / "metrics.jsonl").read_text().count("\n") == 2


def test_a_metric_does_not_hide_what_the_line_is(tmp_path):
    logger = open_logger(tmp_path)
    with pytest.raises(ValueError, match=r"\['kind', 'step'\] would hide"):
        logger.write(1, "validation", "ar", {"kind": "bdlm-4", "step": 2, "loss": 1.0})
    logger.close()


def test_a_folder_that_vanishes_is_an_error_and_not_a_silent_loss(tmp_path):
    (tmp_path / "run").mkdir()
    logger = open_logger(tmp_path / "run")
    log_steps(logger, [1])
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match=r"writing .*metrics.jsonl failed, and again for 0.2 s"):
        log_steps(logger, [2])
    (tmp_path / "elsewhere").rename(tmp_path / "run")
    log_steps(logger, [2])
    logger.close()
    assert steps_of(tmp_path / "run") == [1, 2]


def test_a_folder_that_is_away_at_a_rollback_is_waited_for(tmp_path, monkeypatch):
    run, away = tmp_path / "run", tmp_path / "away"
    run.mkdir()
    logger = open_logger(run)
    log_steps(logger, [1, 2])
    run.rename(away)

    def back(seconds):
        run.exists() or away.rename(run)

    clock = types.SimpleNamespace(monotonic=lambda: 0.0, sleep=back)
    monkeypatch.setattr(retry, "time", clock)
    logger.cut_back(1)
    logger.close()
    assert steps_of(run) == [1]


def test_the_record_of_earlier_steps_is_never_begun_anew(tmp_path):
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        open_logger(tmp_path, first_step=2)
    logger = open_logger(tmp_path)
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(StorageError, match=r"metrics\.jsonl"):
        logger.cut_back(0)
    logger.close()


def test_broken_lines_are_left_out(tmp_path):
    lines = [
        '{"step": null, "kind": "x"}',
        '{"step": "2", "kind": "x"}',
        '{"step": 1, "kind": "x"}',
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    open_logger(tmp_path, first_step=2).close()
    assert steps_of(tmp_path) == [1]


def test_two_runs_in_one_folder_are_noticed(tmp_path):
    first = open_logger(tmp_path)
    second = open_logger(tmp_path)
    with pytest.raises(StorageError, match="is another run writing it"):
        log_steps(first, [1])
    first.close(), second.close()


def test_curves_are_written_and_may_fail_without_harm(tmp_path, monkeypatch, caplog):
    logger = open_logger(tmp_path)

    def full(file, data):
        if not data.startswith(b'{"'):  # not a line of metrics.jsonl
            os.pwrite(file._file, data[:5], file.size)
            raise OSError(28, "No space left on device")
        append(file, data)

    append = metrics._Appended.append
    with monkeypatch.context() as patch:
        patch.setattr(metrics._Appended, "append", full)
        log_steps(logger, [1, 2])
    log_steps(logger, [3])
    logger.close()
    assert steps_of(tmp_path) == [1, 2, 3]
    assert caplog.text.count("TensorBoard's curves will have gaps") == 1
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = [(e.step, v.tag, v.simple_value) for e in events(path) for v in e.summary.value]
    assert scalars == [(3, "train/loss", pytest.approx(1 / 3))]


def test_boards_get_lists_number_by_number(tmp_path):
    logger = open_logger(tmp_path)
    logger.write(1, "grad_norm_by_rate", "decay-4", {"norms": [0.5, 0.25]})
    logger.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    scalars = {v.tag: v.simple_value for e in events(path) for v in e.summary.value}
    assert scalars == {"grad_norm_by_rate/norms/0": 0.5, "grad_norm_by_rate/norms/1": 0.25}


def events(path):
    """What TensorBoard would read, framing and checksums checked."""
    data, found = path.read_bytes(), []
    while data:
        (size,) = struct.unpack("<Q", data[:8])
        assert struct.unpack("<I", data[8:12])[0] == metrics.masked_crc32c(data[:8])
        body, data = data[12 : 12 + size], data[12 + size :]
        assert struct.unpack("<I", data[:4])[0] == metrics.masked_crc32c(body)
        found.append(metrics.Event.FromString(body))
        data = data[4:]
    return found


def test_processes_that_do_not_write_leave_no_files(tmp_path):
    logger = open_logger(tmp_path, write=False)
    log_steps(logger, [1])
    logger.sync(), logger.cut_back(0), logger.close()
    assert list(tmp_path.iterdir()) == []


def test_weights_and_biases(tmp_path, monkeypatch):
    calls = []

    class Run:
        def __getattr__(self, name):
            return lambda *args, **options: calls.append((name, args, options))

    fake = types.SimpleNamespace(init=lambda **options: calls.append(("init", options)) or Run())
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for _ in range(2):
        logger = open_logger(tmp_path, wandb_project="p", config={"seed": 0})
        log_steps(logger, [1])
        logger.close()
    inits = [options for name, options, *_ in calls if name == "init"]
    assert inits[0]["id"] == inits[1]["id"] and inits[0]["resume"] == "allow"
    logged = [args for name, args, *_ in calls if name == "log"]
    assert logged[0] == ({"step": 1, "train/loss": 1.0},)
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match="needs the package wandb: pip install"):
        open_logger(tmp_path, wandb_project="p")


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_weights_and_biases_may_fail_without_harm(tmp_path, monkeypatch, caplog, failing):
    class Run:
        def __getattr__(self, name):
            return lambda *args, **options: call(name)

    def call(name):
        if name == failing:
            raise RuntimeError("no network")
        return Run()

    fake = types.SimpleNamespace(init=lambda **options: call("init"))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    logger = open_logger(tmp_path, wandb_project="p")
    log_steps(logger, [1, 2])
    logger.close()
    assert steps_of(tmp_path) == [1, 2]
    assert caplog.text.count("Weights & Biases will have gaps: no network") == 1


@given(st.binary(max_size=300))
def test_any_bytes_can_be_read(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("fuzz")
    good = b'{"step": 1, "kind": "train"}\n'
    (folder / "metrics.jsonl").write_bytes(good + data)
    lines = read_metrics(folder)
    assert lines[0] == {"step": 1, "kind": "train"} and all("step" in line for line in lines)


def test_retries_end(monkeypatch):
    calls = []

    def fail():
        calls.append(1)
        raise OSError(5, "Input/output error")

    with pytest.raises(StorageError, match=r"reading x failed, and again for 0.2 s: .*Input"):
        with_retries(fail, "reading x", seconds=0.2)
    assert 3 <= len(calls) <= 8
    calls.clear()

    def fail_late():
        time.sleep(0.25)
        fail()

    with pytest.raises(StorageError, match="reading x failed, and again for 0.2 s"):
        with_retries(fail_late, "reading x", seconds=0.2)
    assert len(calls) == 2  # what an attempt takes before its first error does not count
    with pytest.raises(StorageError, match=r"^reading x failed: .*Input"):  # there was one attempt
        with_retries(fail, "reading x", seconds=0)
    with pytest.raises(ZeroDivisionError):
        with_retries(lambda: 1 / 0, "dividing", seconds=9)
