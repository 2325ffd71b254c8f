"""What a run does about preemption, spikes and full disks, in one process; tests/torture does it to
many, at random."""

import contextlib
import dataclasses
import gc
import itertools
import os
import shutil
import signal
import subprocess
import threading
import time
import types

import jax
import numpy as np
import pytest

from llada2_jax import checkpoint, retry
from llada2_jax import train as train_module
from llada2_jax.checkpoint import read_checksums, read_train_item
from llada2_jax.config import ConfigError, SpikeConfig
from llada2_jax.metrics import read_metrics
from llada2_jax.preemption import RESTART, Preempted
from llada2_jax.run_folder import read_starts
from llada2_jax.train import TrainingStopped, train
from llada2_jax.train_checkpoints import TrainCheckpoints
from tests.torture import life
from tests.torture.__main__ import CLOCKS

STEPS = 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    life.prepare(folder)
    return folder


def config(folder, workdir, **spikes):
    """Checkpoints after 4, 8 and 12 steps and at the end; metrics are fetched every other step."""
    cfg = life.make_config(folder, workdir)
    tokens = STEPS * cfg.tokens_per_step
    return dataclasses.replace(
        cfg,
        schedule=dataclasses.replace(cfg.schedule, decay_tokens=tokens),
        optimizer=dataclasses.replace(cfg.optimizer, max_consecutive_skips=2),
        checkpoint=dataclasses.replace(cfg.checkpoint, keep_last=9),
        spikes=SpikeConfig(**spikes),
    )


def saved_steps(workdir) -> list[int]:
    return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())


def at_step(monkeypatch, number: int, action) -> None:
    """Calls action() when the step `number` (from 1) is about to be taken."""
    original = train_module.make_context

    steps = itertools.count(1)

    def make_context(cfg, *args, sigma, **options):
        sigma = action(sigma) if next(steps) == number else sigma
        return original(cfg, *args, sigma=sigma, **options)

    monkeypatch.setattr(train_module, "make_context", make_context)


def terminate(sigma):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.5)  # for the thread that reads it: the next scheduled step is saved in any case
    return sigma


def test_sigterm_saves_at_once_and_asks_to_be_started_again(folder, tmp_path, monkeypatch):
    handler = signal.getsignal(signal.SIGTERM)
    at_step(monkeypatch, 7, terminate)
    with pytest.raises(Preempted) as stop:
        train(config(folder, tmp_path))
    assert stop.value.code == RESTART
    (last,) = [s for s in saved_steps(tmp_path) if s % 4]
    assert last >= 7 and f"step {last} of {STEPS} is saved" in stop.value.message
    item = read_train_item(tmp_path / f"checkpoints/{last}")
    assert item["data"] == {"next_row": last * life.ROWS} and "validation" not in item["metrics"]
    assert item["metrics"]["train"]["loss"] == read_metrics(tmp_path, "train")[-1]["loss"]
    assert signal.getsignal(signal.SIGTERM) == handler
    monkeypatch.undo()
    train(config(folder, tmp_path))
    assert [m["step"] for m in read_metrics(tmp_path, "train")] == list(range(1, STEPS + 1))
    assert [start["step"] for start in read_starts(tmp_path)] == [0, last]
    assert read_starts(tmp_path)[0]["data"]


def startle(monkeypatch, number: int, event: str) -> None:
    """Makes the loss or the gradient of step `number` (from 1) a spike: for it alone, all steps
    before had a hundredth of theirs."""
    make, steps = train_module.make_train_step, itertools.count(1)

    def make_train_step(*args, **options):
        step = make(*args, **options)

        def startled(state, batch, context):
            if next(steps) == number:
                share = np.where(np.arange(2) == ("loss", "grad_norm").index(event), 0.01, 1)
                share = share.astype(np.float32)
                calm = dataclasses.replace(
                    state.watch, mean=state.watch.mean * share, square=state.watch.square * share**2
                )
                state = dataclasses.replace(state, watch=calm)
            return step(state, batch, context)

        return startled

    monkeypatch.setattr(train_module, "make_train_step", make_train_step)


# Noise of infinite strength on the mask's embedding makes a step's loss NaN.
def spoil(sigma: float) -> float:
    return float("inf")


def test_a_rollback_goes_back_and_skips_the_range(folder, tmp_path, monkeypatch):
    at_step(monkeypatch, 9, spoil)
    train(config(folder, tmp_path, non_finite="rollback"))
    lines = read_metrics(tmp_path)
    assert [x["step"] for x in lines if x["kind"] == "train"] == [*range(1, 9), *range(11, 15)]
    (event,) = [x for x in lines if x["kind"] == "rollback"]
    assert (event["step"], event["restored_step"], event["spike_step"]) == (10, 8, 9)
    assert lines[-2]["skipped"] == 2 and np.isfinite(lines[-2]["loss"])
    assert 10 in saved_steps(tmp_path)  # so that a restart does not repeat it
    before, after = (read_checksums(tmp_path / f"checkpoints/{s}") for s in (8, 10))
    params = [name for name in before if name.startswith("params/")]
    assert params and all(before[name] == after[name] for name in params)
    # The rows of the steps skipped are not taken later on, and the learning rate goes by the step.
    undisturbed = tmp_path / "undisturbed"
    monkeypatch.undo()
    train(config(folder, undisturbed))
    wanted = {x["step"]: x for x in read_metrics(undisturbed, "train")}
    for x in lines:
        if x["kind"] == "train":
            same = ("data_checksum", "learning_rate", *(["loss"] if x["step"] < 9 else []))
            assert {k: x[k] for k in same} == {k: wanted[x["step"]][k] for k in same}


def lose_write(monkeypatch, number: int, times: int = 1) -> list[int]:
    """So many writes of checkpoint `number` fail once the run has gone on; returns their list."""
    commit, lost = TrainCheckpoints._commit, []

    def fails(self, step, *args):
        waited_for = threading.current_thread() is threading.main_thread()
        if step != number or waited_for or len(lost) == times:
            return commit(self, step, *args)
        lost.append(step)
        self._checkpointer.wait_until_finished()
        shutil.rmtree(self.folder / str(step))
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TrainCheckpoints, "_commit", fails)
    return lost


def damage(monkeypatch, number: int) -> None:
    """Checkpoint `number` changes on disk after it was written."""
    commit = TrainCheckpoints._commit

    def changes(self, step, *args):
        commit(self, step, *args)
        if step == number and not (self.folder.parent / "damaged").exists():
            (self.folder / f"{step}/train/metadata").write_text("{}")

    monkeypatch.setattr(TrainCheckpoints, "_commit", changes)


def rolling_back(folder, workdir, keep_last=1):
    cfg = config(folder, workdir, non_finite="rollback")
    checkpoints = dataclasses.replace(cfg.checkpoint, keep_last=keep_last, keep_best=0)
    return dataclasses.replace(cfg, checkpoint=checkpoints)


def ending(workdir) -> tuple[list[dict], dict[str, int]]:
    """What the run has recorded, but for clocks, and the checksums of its last state."""
    lines = [{k: v for k, v in x.items() if k not in CLOCKS} for x in read_metrics(workdir)]
    sums = read_checksums(workdir / f"checkpoints/{STEPS}")
    return lines, {name: value for name, value in sums.items() if "/" in name}


@pytest.fixture(scope="module")
def rolled_back(folder, tmp_path_factory):
    """How a run ends that nothing disturbs, and whose step 11 is bad."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "embedding_noise_sigma", life.spoiling({11}))
        train(rolling_back(folder, workdir))
    (event,) = read_metrics(workdir, "rollback")
    assert (event["step"], event["restored_step"]) == (12, 8)
    return ending(workdir)


def test_a_rollback_passes_over_what_a_preemption_saved(folder, tmp_path, monkeypatch, rolled_back):
    monkeypatch.setattr(train_module, "embedding_noise_sigma", life.spoiling({11}))
    at_step(monkeypatch, 9, terminate)
    with pytest.raises(Preempted):
        train(rolling_back(folder, tmp_path))
    assert saved_steps(tmp_path) == [8, 9]  # one more than keep_last: the rollback's
    train(rolling_back(folder, tmp_path))
    assert ending(tmp_path) == rolled_back


@pytest.mark.parametrize(("fault", "keep_last"), [(lose_write, 1), (damage, 2)])
def test_a_rollback_takes_the_steps_to_a_lost_checkpoint_again(
    folder, tmp_path, monkeypatch, rolled_back, fault, keep_last
):
    monkeypatch.setattr(train_module, "embedding_noise_sigma", life.spoiling({11}))
    fault(monkeypatch, 8)
    train(rolling_back(folder, tmp_path, keep_last))
    assert ending(tmp_path) == rolled_back


def test_a_checkpoint_that_is_taken_again_is_waited_for(folder, tmp_path, monkeypatch, rolled_back):
    """Or a run would take the same steps as long as writes in the background fail."""
    monkeypatch.setattr(train_module, "embedding_noise_sigma", life.spoiling({11}))
    lost = lose_write(monkeypatch, 8, times=3)
    train(rolling_back(folder, tmp_path))
    assert ending(tmp_path) == rolled_back and len(lost) == 1


def test_going_back_or_on_needs_no_room_for_two_states(folder, tmp_path, monkeypatch):
    """Also after more bad steps in a row than are skipped without a policy."""
    at_step(monkeypatch, 9, spoil)
    at_step(monkeypatch, 10, spoil)
    restore, held = TrainCheckpoints.restore_newest, []

    def watched(self, *args, **options):
        self.wait()  # a save under way holds what it saves
        gc.collect()
        table = checkpoint.flatten(args[0])["embedding"]
        held.append([x for x in jax.live_arrays() if x.shape == table.shape])
        return restore(self, *args, **options)

    gc.collect()
    known = {id(x) for x in jax.live_arrays()}
    monkeypatch.setattr(TrainCheckpoints, "restore_newest", watched)
    cfg = config(folder, tmp_path, non_finite="rollback")
    assert cfg.optimizer.max_consecutive_skips == 2
    train(cfg)
    assert [x["kind"] for x in read_metrics(tmp_path)].count("rollback") == 1
    train(cfg)  # resumed
    assert len(held) == 2 and all(id(x) in known for arrays in held for x in arrays)


@pytest.mark.parametrize("event", ["loss", "grad_norm"])
def test_a_spike_is_rolled_back(folder, tmp_path, monkeypatch, event):
    startle(monkeypatch, 9, event)
    train(config(folder, tmp_path, window=4, loss="rollback", grad_norm="rollback"))
    (found,) = read_metrics(tmp_path, "rollback")
    assert (found["event"], found["spike_step"], found["restored_step"]) == (event, 9, 8)
    assert np.isfinite([x["loss"] for x in read_metrics(tmp_path, "train")]).all()


def test_a_run_whose_checkpoints_were_taken_away_is_not_begun_anew(folder, tmp_path):
    train(config(folder, tmp_path))
    lines = read_metrics(tmp_path)
    (tmp_path / "checkpoints").rename(tmp_path / "away")
    with pytest.raises(ConfigError, match=r"has saved checkpoints, but .*/checkpoints has none"):
        train(config(folder, tmp_path))
    assert read_metrics(tmp_path) == lines
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "away").rename(tmp_path / "checkpoints")
    train(config(folder, tmp_path))


@pytest.mark.parametrize(
    ("spikes", "number", "message"),
    [
        ({"non_finite": "stop"}, 6, r"spikes\.non_finite='stop' was called for by step 6"),
        ({"non_finite": "rollback"}, 2, r"no checkpoint before it to go back to"),
        ({"non_finite": "rollback", "max_rollbacks": 0}, 6, r"spikes\.max_rollbacks=0 times"),
    ],
)
def test_a_run_that_cannot_go_on_says_so(folder, tmp_path, monkeypatch, spikes, number, message):
    at_step(monkeypatch, number, spoil)
    with pytest.raises(TrainingStopped, match=message):
        train(config(folder, tmp_path, **spikes))
    assert all(step < number for step in saved_steps(tmp_path))


def test_a_spike_stops_the_run(folder, tmp_path, monkeypatch):
    startle(monkeypatch, 6, "grad_norm")
    message = r"spikes\.grad_norm='stop' was called for by step 6"
    with pytest.raises(TrainingStopped, match=message):
        train(config(folder, tmp_path, window=4, loss="rollback", grad_norm="stop"))
    assert saved_steps(tmp_path) == [4]


def test_an_overflow_stops_the_run_and_says_where_to_give_room(folder, tmp_path, monkeypatch):
    make = train_module.make_train_step

    def make_train_step(*args, **options):
        def crowded(state, batch, context):
            number = int(state.step) + 1
            state, metrics = make(*args, **options)(state, batch, context)
            return state, metrics | {"spike_expert_overflow": np.float32(number == 6)}

        return crowded

    monkeypatch.setattr(train_module, "make_train_step", make_train_step)
    message = r"expert_overflow='stop' was called for by step 6; .*runtime\.expert_buffer"
    with pytest.raises(TrainingStopped, match=message):
        train(config(folder, tmp_path))
    assert saved_steps(tmp_path) == [4]
    monkeypatch.undo()
    wider = config(folder, tmp_path)
    runtime = dataclasses.replace(wider.runtime, expert_buffer=0.0)
    train(dataclasses.replace(wider, runtime=runtime))
    assert [x["step"] for x in read_metrics(tmp_path, "train")] == [*range(1, 15)]


@pytest.fixture
def disk(tmp_path):
    """A file system of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder]).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield folder
    subprocess.run(["umount", folder], check=True)


# Orbax leaves event loops and futures behind when a save fails, which complain when collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_is_waited_for(folder, disk, monkeypatch):
    ballast, pauses = disk / "ballast", []

    def fill(sigma):
        with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(1 << 16))
        return sigma

    def free_after_two(seconds):
        pauses.append(seconds)
        if len(pauses) >= 2:
            ballast.unlink(missing_ok=True)
        time.sleep(seconds)

    at_step(monkeypatch, 6, fill)
    # Not time.sleep itself: the pauses of other threads would be counted too.
    clock = types.SimpleNamespace(monotonic=time.monotonic, sleep=free_after_two)
    monkeypatch.setattr(retry, "time", clock)
    train(config(folder, disk / "run"))
    assert len(pauses) >= 2
    assert [m["step"] for m in read_metrics(disk / "run", "train")] == [*range(1, STEPS + 1)]
    monkeypatch.undo()
    train(config(folder, disk / "run"))  # all there: restored, verified, and nothing left to do
    assert saved_steps(disk / "run")[-1] == STEPS and not (disk / "run/damaged").exists()
