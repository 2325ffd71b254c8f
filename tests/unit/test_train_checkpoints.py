"""A run's checkpoints: written behind its back, verified when they come back, kept by rule."""

import dataclasses
import json
import logging
import shutil
import subprocess
import sys
import textwrap
import threading
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from hypothesis import given, settings
from hypothesis import strategies as st

from llada2_jax import checkpoint, retry, train_checkpoints
from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.config import CheckpointConfig
from llada2_jax.data.loader import batches
from llada2_jax.data.packing import PackedRows, TokenizedDocuments
from llada2_jax.hub import load_model
from llada2_jax.merge import merge_checkpoints, select_best
from llada2_jax.model import build
from llada2_jax.retry import StorageError
from llada2_jax.train_checkpoints import Retention, TrainCheckpoints
from llada2_jax.types import SpecialTokens
from tests.helpers import assert_same_params, config

CONFIG = config()
ABSTRACT = build(CONFIG)[1]
BUNDLE = ModelBundle(CONFIG, None, SpecialTokens(mask=15, eos=14, pad=13))
CFG = CheckpointConfig(retry_seconds=0.3)


@pytest.fixture(autouse=True)
def _quick_retries(monkeypatch):
    monkeypatch.setattr(retry, "FIRST_DELAY", 0.02)


def state(seed: int):
    """(params, optimizer) of a step."""
    rng = np.random.default_rng(seed)
    leaves = {
        path: rng.standard_normal(leaf.shape).astype(leaf.dtype)
        for path, leaf in checkpoint.flatten(ABSTRACT).items()
    }
    moments = {"m": jnp.asarray(rng.standard_normal((3, 4)), jnp.float32), "n": jnp.int32(seed)}
    return checkpoint.fill_params(ABSTRACT, leaves), moments


def train_item(step: int, **scores) -> dict:
    return {"step": step, "metrics": {"validation": scores} if scores else {}}


def save(checkpoints: TrainCheckpoints, step: int, **scores) -> None:
    checkpoints.save(step, BUNDLE, *state(step), train_item(step, **scores))


def restored_step(checkpoints: TrainCheckpoints, **options) -> int:
    """The step that comes back, after a look at all of its state."""
    params, optimizer, train = checkpoints.restore_newest(*state(999), **options)
    assert_same_params((params, optimizer), state(train["step"]))
    return train["step"]


@pytest.fixture
def run(tmp_path):
    """A run with checkpoints 1, 2 and 3."""
    checkpoints = TrainCheckpoints(tmp_path, dataclasses.replace(CFG, keep_last=9))
    for step in (1, 2, 3):
        save(checkpoints, step)
    checkpoints.close()
    return tmp_path


def flip(path: Path, position: int, bit: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1 << bit
    path.write_bytes(data)


# ---- there and back ------------------------------------------------------------------------------


def test_the_newest_comes_back(run):
    checkpoints = TrainCheckpoints(run, CFG)
    assert checkpoints.steps() == [1, 2, 3]
    assert restored_step(checkpoints) == 3
    assert restored_step(checkpoints, before=3) == 2
    assert checkpoints.restore_newest(*state(0), before=1) is None
    assert_same_params(load_model(run / "checkpoints/2").params, state(2)[0])
    checkpoints.close()


def test_saving_does_not_wait_for_storage_and_the_state_may_be_donated(tmp_path, monkeypatch):
    checkpoints = TrainCheckpoints(tmp_path, CFG)
    commit, release = checkpoints._commit, threading.Event()
    monkeypatch.setattr(checkpoints, "_commit", lambda *a: (release.wait(30), commit(*a)))
    params, optimizer = state(7)
    checkpoints.save(7, BUNDLE, params, optimizer, train_item(7))
    assert checkpoints._thread.is_alive()  # save() came back before the commit
    change = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(change((params, optimizer)))
    release.set()
    checkpoints.wait()
    assert restored_step(checkpoints) == 7
    checkpoints.close()


def test_storage_slower_than_the_interval_holds_up_the_next_save_and_loses_nothing(
    tmp_path, monkeypatch
):
    checkpoints = TrainCheckpoints(tmp_path, dataclasses.replace(CFG, keep_last=9))
    commit, begun, release = checkpoints._commit, threading.Semaphore(0), threading.Semaphore(0)
    monkeypatch.setattr(
        checkpoints, "_commit", lambda *a: (begun.release(), release.acquire(), commit(*a))
    )
    save(checkpoints, 1)
    second = threading.Thread(target=save, args=[checkpoints, 2])
    second.start()
    assert begun.acquire(timeout=60) and not begun.acquire(timeout=0.3)  # 2 waits for 1
    assert second.is_alive() and 2 not in checkpoints.steps()
    release.release()
    assert begun.acquire(timeout=60)
    release.release()
    second.join()
    checkpoints.wait()
    assert checkpoints.steps() == [1, 2] and restored_step(checkpoints) == 2
    assert restored_step(checkpoints, before=2) == 1
    checkpoints.close()


def test_another_mesh(tmp_path):
    """Saved from 8 devices, restored on 2 and on 1, and what a single process sees of it."""
    script = """
        import jax, sys
        jax.config.update("jax_num_cpu_devices", 8)
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from flax import nnx
        from tests.unit.test_train_checkpoints import *

        def placed(tree, count):
            mesh = Mesh(np.asarray(jax.devices()[:count]).reshape(count), "fsdp")
            def put(x):
                axis = next((i for i, n in enumerate(x.shape) if n % count == 0), None)
                spec = [None] * x.ndim if axis is None else [None] * axis + ["fsdp"]
                return jax.device_put(x, NamedSharding(mesh, P(*spec)))
            return jax.tree.map(put, tree)

        checkpoints = TrainCheckpoints(sys.argv[1], CFG)
        checkpoints.save(5, BUNDLE, *placed(state(5), 8), train_item(5))
        for count in (2, 1):
            like = placed(state(0), count)
            params, optimizer, _ = checkpoints.restore_newest(*like)
            assert_same_params((params, optimizer), state(5))
            for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(like[0]), strict=True):
                assert a.sharding == b.sharding, (a.sharding, b.sharding)
        assert len(params["head"][...].sharding.device_set) == 1
        checkpoints.close()
    """
    command = [sys.executable, "-c", textwrap.dedent(script), str(tmp_path)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    checkpoints = TrainCheckpoints(tmp_path, CFG)
    assert restored_step(checkpoints) == 5
    checkpoints.close()


@given(
    lives=st.lists(st.tuples(st.sampled_from([1, 2, 4]), st.integers(1, 4)), min_size=1, max_size=5)
)
@settings(max_examples=8, deadline=None)
def test_no_document_is_lost_or_repeated_when_processes_change(lives):
    """Lives of some processes and some steps follow each other, each from where the last ended."""
    rng = np.random.default_rng(0)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(3, 20, 30))])
    documents = TokenizedDocuments(np.zeros(offsets[-1], np.int32), np.arange(30), offsets)
    steps = sum(count for _, count in lives)
    rows = PackedRows(documents, 8, 4 * steps, 0, None)

    def seen(first: int, count: int, process: int, processes: int) -> list[tuple[int, int, int]]:
        share = np.split(np.arange(4), processes)[process]
        source = batches(rows, rows_per_step=4, first_step=first, share=share)
        taken = [next(source) for _ in range(count)]
        fields = ("document_ids", "document_positions", "visits")
        return list(zip(*(np.ravel([getattr(b, f) for b in taken]) for f in fields), strict=True))

    found, first = [], 0
    for processes, count in lives:
        for process in range(processes):
            found += seen(first, count, process, processes)
        first += count
    assert sorted(found) == sorted(seen(0, steps, 0, 1))


# ---- damage --------------------------------------------------------------------------------------


def test_a_flipped_bit_of_an_array_is_noticed_and_the_one_before_is_used(run, caplog):
    # In every file of size: some hold what merging within the write has left behind, unread.
    for data in (run / "checkpoints/3").rglob("*"):
        if data.is_file() and data.stat().st_size >= 1024:
            flip(data, data.stat().st_size // 2, 3)
    checkpoints = TrainCheckpoints(run, CFG)
    with caplog.at_level(logging.WARNING):
        assert restored_step(checkpoints) == 2
    assert "checkpoint 3 is damaged" in caplog.text and "from checkpoint 2" in caplog.text
    assert checkpoints.steps() == [1, 2] and list((run / "damaged").glob("3-*"))
    save(checkpoints, 3)  # the step is taken again
    checkpoints.wait()
    assert restored_step(checkpoints) == 3
    checkpoints.close()


# Orbax leaves event loops and futures behind when a restore fails, which they complain of when
# they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_flip_in_any_file_gives_another_state(data, tmp_path_factory):
    """Either the state is the saved one, or the checkpoint is refused."""
    source = _saved_once(tmp_path_factory)
    files = sorted(p.relative_to(source) for p in source.rglob("*") if p.is_file())
    name = data.draw(st.sampled_from(files))
    folder = tmp_path_factory.mktemp("flip")
    shutil.copytree(source, folder, dirs_exist_ok=True)
    size = max((folder / name).stat().st_size, 1)
    kind = data.draw(st.sampled_from(["flip", "truncate", "delete"]))
    if kind == "delete" or not (folder / name).stat().st_size:
        (folder / name).unlink()
    elif kind == "truncate":
        (folder / name).write_bytes((folder / name).read_bytes()[: data.draw(st.integers(0, size))])
    else:
        flip(folder / name, data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, 7)))
    checkpoints = TrainCheckpoints(folder, CFG)
    try:
        assert restored_step(checkpoints) == 4
    except CheckpointError as error:
        assert "no checkpoint under" in str(error)
    finally:
        checkpoints.close()
        shutil.rmtree(folder)


_saved: list[Path] = []


def _saved_once(tmp_path_factory) -> Path:
    if not _saved:
        folder = tmp_path_factory.mktemp("source")
        checkpoints = TrainCheckpoints(folder, CFG)
        save(checkpoints, 4)
        checkpoints.close()
        _saved.append(folder)
    return _saved[0]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_begun_anew(run):
    for step in (1, 2, 3):
        shutil.rmtree(run / f"checkpoints/{step}/checksums")
    checkpoints = TrainCheckpoints(run, CFG)
    with pytest.raises(CheckpointError, match=r"no checkpoint .* can be restored \(3: it has no"):
        checkpoints.restore_newest(*state(0))
    assert checkpoints.steps() == [1, 2, 3]  # nothing was moved
    checkpoints.close()


@pytest.mark.parametrize("item", ["train", "model"])
def test_json_that_was_changed_is_noticed(run, item):
    path = run / f"checkpoints/3/{item}/metadata"
    path.write_text(path.read_text().replace(":3", ":4").replace(": 3", ": 4").replace("16", "17"))
    checkpoints = TrainCheckpoints(run, CFG)
    assert restored_step(checkpoints) == 2
    checkpoints.close()


def test_other_readers_notice_damage_too(run, tmp_path):
    path = run / "checkpoints/3/checksums/metadata"
    item = json.loads(path.read_text())
    sums = item["arrays"] | {"params/head": item["arrays"]["params/head"] ^ 1}
    path.write_text(json.dumps(train_checkpoints.seal(sums)))
    with pytest.raises(CheckpointError, match="parameter head is damaged"):
        load_model(run / "checkpoints/3")
    sources = [run / "checkpoints/2", run / "checkpoints/3"]
    with pytest.raises(CheckpointError, match="3/params: parameter head is damaged"):
        merge_checkpoints(sources, tmp_path / "out")
    path.write_text(path.read_text().replace("params/head", "params/hand"))
    with pytest.raises(CheckpointError, match="themselves damaged"):
        checkpoint.read_checksums(run / "checkpoints/3")


@pytest.mark.parametrize("item", ["model", "tokenizer"])
def test_other_readers_notice_json_that_was_changed(run, tmp_path, item):
    path = run / f"checkpoints/3/{item}/metadata"
    changed = {"rope_theta": 1.0} if item == "tokenizer" else json.loads(path.read_text())
    changed.setdefault("config", {})["rope_theta"] = 1.0
    path.write_text(json.dumps(changed))
    with pytest.raises(CheckpointError, match=rf"checkpoints/3: the item {item} is damaged"):
        load_model(run / "checkpoints/3")
    with pytest.raises(CheckpointError, match=f"the item {item} is damaged"):
        merge_checkpoints([run / "checkpoints/2", run / "checkpoints/3"], tmp_path / "out")


def test_a_changed_score_decides_nothing(tmp_path, caplog):
    """Neither what is merged, nor what is deleted: the best undisturbed one stays."""
    checkpoints = TrainCheckpoints(tmp_path, dataclasses.replace(CFG, keep_last=9))
    for step, value in ((1, 5.0), (2, 4.0), (3, 3.0)):
        save(checkpoints, step, bits_per_byte=value, kind="ar")
    checkpoints.close()
    assert [c.step for c in select_best(tmp_path, 1).chosen] == [3]
    path = tmp_path / "checkpoints/1/train/metadata"
    path.write_text(path.read_text().replace("5.0", "1.0"))
    with pytest.raises(CheckpointError, match=r"checkpoints/1: the item train is damaged"):
        select_best(tmp_path, 1)
    checkpoints = TrainCheckpoints(tmp_path, dataclasses.replace(CFG, keep_last=1, keep_best=1))
    assert "checkpoint 1 counts as not measured" in caplog.text
    save(checkpoints, 4, bits_per_byte=3.5, kind="ar")
    checkpoints.close()
    assert checkpoints.steps() == [3, 4]


def test_training_saves_whole_slices_of_the_leading_axes():
    """Experts of flash in fp32, on one device and on eight, and tables that have no such slices."""
    (device,) = jax.devices()[:1]
    here = jax.sharding.SingleDeviceSharding(device)

    def axes(*shape):
        leaf = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=here)
        return train_checkpoints._chunked(leaf).shard_axes

    assert axes(31, 256, 4096, 2048) == axes(31, 32, 4096, 2048) == (0, 1)
    assert axes(31, 4096, 4096) == (0,)
    assert axes(157184, 4096) == axes(4096, 157184) == axes(31, 4096) == axes() == ()


# ---- storage that fails --------------------------------------------------------------------------


def read_error() -> ValueError:
    """What TensorStore makes of an error of the operating system."""
    store = tensorstore.KvStore.open({"driver": "file", "path": "/"}).result()
    with pytest.raises(ValueError) as caught:
        store.read("name too long" * 99).result()
    return caught.value


@pytest.mark.parametrize("error", [read_error(), OSError(5, "Input/output error")])
def test_a_read_error_is_no_damage(run, monkeypatch, caplog, error):
    checkpoints, restore, fails = TrainCheckpoints(run, CFG), TrainCheckpoints._restore, [2]

    def flaky(self, *args):
        if fails[0]:
            fails[0] -= 1
            raise error
        return restore(self, *args)

    monkeypatch.setattr(TrainCheckpoints, "_restore", flaky)
    assert restored_step(checkpoints) == 3 and not fails[0]
    fails[0] = 1000
    with pytest.raises(StorageError, match="reading checkpoint 3 .* again for 0.3 s"):
        restored_step(checkpoints)
    assert checkpoints.steps() == [1, 2, 3] and "damaged" not in caplog.text
    checkpoints.close()


@pytest.mark.parametrize("when", ["before the listing", "after the listing"])
def test_a_folder_that_is_away_for_a_while_is_waited_for(run, monkeypatch, when):
    checkpoints, read = TrainCheckpoints(run, CFG), checkpoint.read_checksums
    folder, away = run / "checkpoints", run / "away"
    pauses = []

    def back(seconds):
        pauses.append(seconds)
        if len(pauses) == 2:
            away.rename(folder)

    def vanishing(path):
        if not pauses and folder.exists():
            folder.rename(away)
        return read(path)

    clock = types.SimpleNamespace(monotonic=lambda: 0.0, sleep=back)
    monkeypatch.setattr(retry, "time", clock)
    if when == "before the listing":
        folder.rename(away)
    else:
        monkeypatch.setattr(checkpoint, "read_checksums", vanishing)
    assert restored_step(checkpoints, before=4) == 3 and len(pauses) == 2
    assert checkpoints.steps() == [1, 2, 3]
    checkpoints.close()


@pytest.mark.parametrize("instead", ["nothing", "an empty folder"])
def test_a_run_whose_checkpoints_went_is_not_begun_anew(run, instead):
    checkpoints = TrainCheckpoints(run, CFG)
    (run / "checkpoints").rename(run / "away")
    if instead == "an empty folder":  # what a file system was mounted on
        (run / "checkpoints").mkdir()
    with pytest.raises(StorageError, match="listing .*/checkpoints is gone"):
        checkpoints.restore_newest(*state(0))
    checkpoints.close()


def test_what_is_damage_and_what_is_storage():
    for text in ("UNAVAILABLE: x", "NOT_FOUND: x [os_error_code='2']", "DATA_LOSS: x", "x"):
        assert retry.storage_failed(ValueError(text)) == text.startswith("UNAVAILABLE")
    assert retry.storage_failed(read_error())
    assert not retry.storage_failed(KeyError("UNAVAILABLE: x"))


def test_a_failed_write_is_noticed_and_made_good_by_the_next(tmp_path, monkeypatch):
    class Full:
        """A checkpointer on a disk that fills up."""

        def save(self, path, args):
            path.with_name(f"{path.name}{train_checkpoints.PARTIAL}-1").mkdir()

        def wait_until_finished(self):
            raise OSError(28, "No space left on device")

        def close(self):
            pass

    checkpoints = TrainCheckpoints(tmp_path, CFG)
    save(checkpoints, 1)
    checkpoints.wait()
    following = iter([Full(), train_checkpoints._checkpointer()])
    monkeypatch.setattr(checkpoints, "_checkpointer", Full())
    monkeypatch.setattr(train_checkpoints, "_checkpointer", lambda: next(following))
    save(checkpoints, 2)
    checkpoints.wait()
    assert checkpoints.failed and checkpoints.steps() == [1]
    save(checkpoints, 3)  # once more in vain, then written, before save returns
    assert not checkpoints.failed and checkpoints.steps() == [1, 3]
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["1", "3"]
    assert restored_step(checkpoints) == 3
    checkpoints.close()


def test_storage_that_stays_away_ends_in_one_clear_error(run):
    checkpoints = TrainCheckpoints(run, CFG)
    (run / "checkpoints").rename(run / "elsewhere")
    with pytest.raises(StorageError, match=r"writing checkpoint 4 .*again for 0.3 s.*is gone"):
        save(checkpoints, 4)
    assert not (run / "checkpoints").exists()
    (run / "elsewhere").rename(run / "checkpoints")
    assert restored_step(checkpoints) == 3
    checkpoints.close()


def test_files_that_cannot_be_deleted_cost_space_and_no_more(run, monkeypatch, caplog):
    checkpoints, rmtree = TrainCheckpoints(run, CFG), shutil.rmtree
    (run / "checkpoints/3.deleted/left").mkdir(parents=True)  # of an earlier step 3

    def refuse(path, ignore_errors=False):
        if not ignore_errors:
            raise OSError(5, "Input/output error")
        rmtree(path, ignore_errors=True)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    checkpoints.discard_after(1)
    assert checkpoints.steps() == [1] and "3.deleted was not removed" in caplog.text
    checkpoints.close()


def test_what_a_killed_process_left_is_removed(run):
    for name in ("4.orbax-checkpoint-tmp-7", "1.deleted"):
        shutil.copytree(run / "checkpoints/3", run / "checkpoints" / name)
    checkpoints = TrainCheckpoints(run, CFG)
    assert sorted(p.name for p in checkpoints.folder.iterdir()) == ["1", "2", "3"]
    checkpoints.close()


# ---- retention -----------------------------------------------------------------------------------


def test_the_newest_the_best_of_each_kind_and_every_so_often():
    scores = {
        step: {"kind": "ar" if step < 6 else "bdlm", "bits_per_byte": abs(step - 3.1)}
        for step in range(1, 11)
    }
    scores[10] = {}  # saved on a preemption: not measured
    assert Retention(last=2, best=1).kept(scores) == {9, 10, 3, 6}
    assert Retention(last=1, best=2).kept(scores) == {10, 3, 4, 6, 7}
    assert Retention(last=1, best=0, every_tokens=4).kept(scores) == {10, 4, 8}
    assert Retention(last=1, best=0, every_tokens=3).kept({2: {}, 4: {}, 5: {}, 7: {}}) == {4, 7}


def test_what_a_rollback_would_go_back_to_is_kept():
    steps: dict[int, dict] = {4: {}, 8: {}, 9: {}, 10: {}}
    retention = Retention(last=1, best=0)
    assert retention.kept(steps, rollback_to=8) == {8, 10}
    assert retention.kept(steps, rollback_to=10) == {10}
    assert retention.kept(steps, rollback_to=7) == {4, 10}  # 7 was lost


def test_every_so_often_is_counted_in_tokens(tmp_path):
    """Also where a multiple is not a whole number of steps: the rest does not add up."""
    cfg = dataclasses.replace(CFG, keep_last=1, keep_every_tokens=10_000)
    checkpoints = TrainCheckpoints(tmp_path, cfg, tokens_per_step=3000)
    for step in (4, 7, 8, 9):
        save(checkpoints, step)
    checkpoints.close()
    assert checkpoints.steps() == [4, 7, 9]


def test_without_bits_per_byte_the_loss_decides():
    scores = {step: {"kind": "dpo", "loss": abs(step - 2.1)} for step in range(1, 5)}
    assert Retention(last=1, best=1).kept(scores) == {2, 4}


def test_old_ones_go_once_the_new_one_is_there(tmp_path):
    cfg = dataclasses.replace(CFG, keep_last=1, keep_best=1)
    checkpoints = TrainCheckpoints(tmp_path, cfg)
    for step, value in ((1, 3.0), (2, 1.0), (3, 2.0)):
        save(checkpoints, step, kind="ar", bits_per_byte=value)
    checkpoints.close()
    checkpoints = TrainCheckpoints(tmp_path, cfg)  # scores are read back
    assert checkpoints.steps() == [2, 3]
    save(checkpoints, 4)
    checkpoints.wait()
    assert checkpoints.steps() == [2, 4]
    checkpoints.close()
