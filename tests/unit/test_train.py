"""Parts of the training loop; tests/e2e runs the whole."""

import dataclasses
import time
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import ConfigError, DataConfig, Phase, ScheduleConfig, TrainConfig
from llada2_jax.evals.likelihood import default_row_length
from llada2_jax.metrics import MetricLogger, read_metrics
from llada2_jax.sharding import make_mesh, single_device_mesh
from llada2_jax.train import Run, _Pending, _restored, _save, _Trace, _validate
from llada2_jax.train_step import eval_program
from llada2_jax.types import SpecialTokens
from tests.helpers import TINY, config


def traced(folder, steps: int) -> tuple[list, list[str]]:
    """The trace files that a run of so many steps leaves, and what it says."""
    said, step = [], jax.jit(lambda x: x + 1)
    trace, metrics = _Trace(str(folder), said.append), jnp.zeros(())
    for _ in range(steps):
        metrics = step(metrics)
        trace.after({"loss": metrics})
    trace.close()
    return sorted(folder.rglob("*.xplane.pb")), said


@pytest.mark.parametrize(("steps", "whole"), [(7, 2), (20, 10)])
def test_a_run_leaves_a_trace_of_the_steps_it_had(tmp_path, steps, whole):
    files, said = traced(tmp_path, steps)
    assert len(files) == 1 and files[0].stat().st_size > 0
    assert said == [f"a trace of {whole} steps is in {tmp_path}"]


def test_a_run_that_is_too_short_says_so(tmp_path):
    files, said = traced(tmp_path, 4)
    assert not files and said == [
        f"no trace in {tmp_path}: it begins after 5 steps, and this start took 4"
    ]


def test_without_a_folder_there_is_no_trace(monkeypatch):
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: pytest.fail("traced"))
    trace = _Trace("", pytest.fail)
    for _ in range(20):
        trace.after({})
    trace.close()


def test_a_program_is_compiled_once_for_all_phases_of_an_objective():
    absent: Any = SimpleNamespace(config=TINY)
    run = Run(TrainConfig(), *[absent] * 6, single_device_mesh(), absent)
    first, later = Phase("decay-8", "bdlm", 8, 9), Phase("decay-4", "bdlm", 4, 9)
    for program in (run.train_step, run.grad_norms_by_rate):
        assert program(first) is program(later)
        assert program(first) is not program(Phase("cap", "cap", 4, 9))
    assert eval_program(TINY, "bdlm", None) is eval_program(TINY, "bdlm", None)


def test_validation_is_a_line_of_that_kind(monkeypatch, tmp_path):
    """What it measured stands beside it, as it does in the checkpoint."""
    scores = {"kind": "ar:ar-1", "bits_per_byte": 1.0, "bits_per_byte_stderr": 0.1}
    logger = MetricLogger(tmp_path, total_steps=2, first_step=0, tokens_per_step=4, label="")
    run = SimpleNamespace(cfg=TrainConfig(), validate=lambda phase: dict(scores), logger=logger)
    phase = Phase("ar", "ar", 1, 8)
    assert _validate(run, 2, phase, None, None, ends=True) == scores  # pyright: ignore
    logger.close()
    [line] = read_metrics(tmp_path, "validation")
    assert line["measured"] == "ar:ar-1" and line["bits_per_byte"] == 1.0 and line["step"] == 2


def test_a_checkpoint_tells_how_long_its_rows_were():
    saved = []
    data = DataConfig(row_length=48)
    bundle = ModelBundle(config=config(), params=None, special=SpecialTokens(mask=0, eos=1, pad=1))
    run = SimpleNamespace(
        cfg=TrainConfig(workdir="w", data=data, schedule=ScheduleConfig(ar_tokens=1000)),
        bundle=bundle,
        logger=SimpleNamespace(sync=lambda: None),
        rollback_to=0,
        latest={},
        state=SimpleNamespace(saved_params=None, beside_params=None),
        checkpoints=SimpleNamespace(save=lambda step, bundle, *_, wait: saved.append(bundle)),
    )
    _save(run, 1)  # pyright: ignore[reportArgumentType]
    assert default_row_length(saved[0]) == 48 != default_row_length(bundle)


def test_only_an_idle_device_waits_for_data():
    def slow():
        while True:
            time.sleep(0.02)
            yield None

    source = slow()
    for ready, waits in ((None, True), (True, True), (False, False)):
        loss = SimpleNamespace(is_ready=lambda ready=ready: ready)
        pending = _Pending([] if ready is None else [(1, None, {"loss": loss})])  # pyright: ignore[reportArgumentType]
        pending.next(source)  # pyright: ignore[reportArgumentType]
        assert (pending.input_wait >= 0.02) == waits


def test_a_checkpoint_at_another_row_of_the_data_is_not_resumed():
    """As after config.json was removed to get past a changed config."""
    item = {"step": 4, "data": {"next_row": 32}}
    checkpoints = SimpleNamespace(restore_newest=lambda *like, before: (None, None, item))
    cfg = TrainConfig(workdir="w", data=DataConfig(rows_per_step=4))
    mesh = make_mesh(cfg.mesh, jax.devices()[:1])
    with pytest.raises(
        ConfigError, match=r"at row 32 .*rows_per_step=4 puts it at 16: set it to 8"
    ):
        _restored(cfg, checkpoints, config(), mesh, None)  # pyright: ignore[reportArgumentType]


def test_checksums_of_a_model_tell_its_parts_apart():
    model = ModelBundle(
        config=config(),
        params={"layer": {"w": jnp.arange(4.0)}},
        special=SpecialTokens(mask=0, eos=1, pad=1),
        tokenizer_files={"tokenizer.json": "{}"},
    )
    others = {
        "tokenizer": {"tokenizer_files": {"tokenizer.json": "{ }"}},
        "architecture": {"config": config(rope_theta=1e4)},
        "parameters": {"params": {"layer": {"w": jnp.arange(4.0)[::-1]}}},
    }
    before = model.checksums()
    assert before == dataclasses.replace(model, config=config(remat="full")).checksums()
    for part, change in others.items():
        after = dataclasses.replace(model, **change).checksums()
        assert [name for name in before if before[name] != after[name]] == [part]
