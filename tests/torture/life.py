"""One life of the tortured run: a process that trains until it is done, or until it is killed.

The fork server imports this module once, and every life is a fork of it: a new process with its
own device, compiled functions and files, that skips only the imports.
"""

import functools
import os
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np

from llada2_jax import train as train_module
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.config import (
    CheckpointConfig,
    DataConfig,
    EvalConfig,
    InitConfig,
    OptimizerConfig,
    RuntimeConfig,
    ScheduleConfig,
    SpikeConfig,
    TrainConfig,
)
from llada2_jax.schedules import embedding_noise_sigma
from llada2_jax.train_checkpoints import TrainCheckpoints
from llada2_jax.types import SpecialTokens
from tests.helpers import one_layer, random_params
from tests.tiny_run import VOCAB, write_corpus

STEPS, SAVE_EVERY, ROW, ROWS = 60, 4, 32, 2
BAD = {32, 46}  # of the steps: their loss is NaN, and the run rolls back to 28 and to 44
SPECIAL = SpecialTokens(mask=0, eos=1, pad=1, bos=2)


def prepare(folder: Path) -> None:
    """What all lives share: the corpus, and a model to start from."""
    write_corpus(folder)
    files = {p.name: p.read_text() for p in (folder / "tokenizer").iterdir()}
    config = one_layer(vocab_size=VOCAB, initializer_range=0.02)
    bundle = ModelBundle(config, random_params(config, 0, 0.3), SPECIAL, tokenizer_files=files)
    save_model(folder / "parent", bundle)


def make_config(folder: Path, workdir: Path, steps: int = STEPS) -> TrainConfig:
    """Block diffusion on two rows a step; metrics are fetched every other step."""
    step = ROW * ROWS
    return TrainConfig(
        workdir=str(workdir),
        init=InitConfig(checkpoint=str(folder / "parent")),
        data=DataConfig(source=str(folder / "corpus"), row_length=ROW, rows_per_step=ROWS),
        schedule=ScheduleConfig(decay_blocks=(4,), decay_tokens=steps * step),
        optimizer=OptimizerConfig(expert_bias_rate=0.01),
        eval=EvalConfig(rows=2, rate_buckets=0),
        checkpoint=CheckpointConfig(
            every_tokens=SAVE_EVERY * step, keep_last=3, keep_best=1, retry_seconds=60.0
        ),
        spikes=SpikeConfig(non_finite="rollback"),
        runtime=RuntimeConfig(dtype="float32", attention_backend="xla"),
        log_every=2,
    )


def live(folder: Path, workdir: Path, steps: int, seen: Connection) -> None:
    """Trains in this process, and sends to `seen` None when it has found its run, and each step
    with its documents: a pipe takes them even while the disk does not."""
    log = os.open(f"{workdir}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    jax.config.update("jax_compilation_cache_dir", str(folder / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if not (folder / "parent").exists():
        prepare(folder)
    train_module.TrainCheckpoints = functools.partial(_announced, seen)
    train_module.make_train_step = _recording(train_module.make_train_step, seen)
    train_module.embedding_noise_sigma = spoiling(BAD)
    train_module.train(make_config(folder, workdir, steps))


def _announced(seen: Connection, *args, **options) -> TrainCheckpoints:
    checkpoints = TrainCheckpoints(*args, **options)
    seen.send(None)
    return checkpoints


def spoiling(steps: Collection[int]) -> Callable[[TrainConfig, int], float]:
    """embedding_noise_sigma that makes the loss of these steps (from 1) NaN whenever they are
    taken, as their data would: noise of infinite strength on the mask's embedding."""

    def strength(cfg: TrainConfig, step: int) -> float:
        return float("inf") if step + 1 in steps else embedding_noise_sigma(cfg, step)

    return strength


def _recording(make_train_step, seen: Connection):
    """make_train_step, whose steps tell what tokens they take of each (document, visit)."""

    def make(*args):
        step = make_train_step(*args)

        def recorded(state, batch, context):
            pairs = np.stack([batch.document_ids, batch.visits], -1).reshape(-1, 2)
            unique, counts = np.unique(pairs, axis=0, return_counts=True)
            seen.send(
                (
                    int(state.step) + 1,
                    [(*p, c) for p, c in zip(unique.tolist(), counts.tolist(), strict=True)],
                )
            )
            return step(state, batch, context)

        return recorded

    return make
