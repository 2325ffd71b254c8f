"""`make bench`: the share of a training step that is not the model's.

The real loop (input, logging, waiting for metrics) against the bare jitted step on one batch that
lies on the device, in one process and in turns, so that their ratio means something on a machine
that does other things as well. The times themselves are of that machine.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llada2_jax.config import ConfigError, ScheduleConfig, TrainConfig, load_config
from llada2_jax.config_check import validate
from llada2_jax.data.corpus import Corpus, load_corpus
from llada2_jax.data.loader import batches
from llada2_jax.evals.likelihood import tokenizer_of
from llada2_jax.inputs import positive
from llada2_jax.metrics import read_metrics
from llada2_jax.sharding import make_mesh, place_batch, replicated
from llada2_jax.starting_model import starting_bundle
from llada2_jax.train import train
from llada2_jax.train_step import init_state, make_context, make_train_step


@dataclasses.dataclass(frozen=True)
class Overhead:
    """Seconds a step, one entry a round. loop: of training. step: of the bare step."""

    loop: tuple[float, ...]
    step: tuple[float, ...]

    @property
    def shares_outside(self) -> list[float]:
        """1 − step / loop of each round, sorted; negative where noise is larger than the share."""
        return sorted(1 - step / loop for loop, step in zip(self.loop, self.step, strict=True))

    def summary(self) -> dict[str, float | list[float]]:
        return {
            "loop_seconds": float(np.median(self.loop)),
            "step_seconds": float(np.median(self.step)),
            "share_outside_model": float(np.median(self.shares_outside)),
            "share_of_rounds": [round(share, 4) for share in self.shares_outside],
        }


def loop_overhead(cfg: TrainConfig, *, steps: int, rounds: int) -> Overhead:
    """Times `steps` steps of the loop and of the bare step, `rounds` times in turns.

    cfg: what to train, autoregressively; its stages, validation and checkpoints are left out.
    Steps that compile come before and are not timed. Raises: ConfigError, CheckpointError.
    """
    if min(steps, rounds) < 1:
        raise ConfigError(f"steps={steps}, rounds={rounds}: both must be at least 1")
    warm = cfg.log_every  # the loop's clock can be read where it logs
    total = warm + -(-steps // warm) * warm
    cfg = dataclasses.replace(
        cfg,
        schedule=ScheduleConfig(ar_tokens=total * cfg.tokens_per_step),
        eval=dataclasses.replace(cfg.eval, rows=cfg.data.rows_per_step, every_tokens=0),
        checkpoint=dataclasses.replace(cfg.checkpoint, every_tokens=0),
    )
    bundle = starting_bundle(cfg)
    corpus = load_corpus(cfg.data, tokenizer_of(bundle), bundle.special)
    timed = [(_loop_seconds(cfg, corpus, warm), _step_seconds(cfg, corpus)) for _ in range(rounds)]
    loop, step = zip(*timed, strict=True)
    return Overhead(loop, step)


def _loop_seconds(cfg: TrainConfig, corpus: Corpus, warm: int) -> float:
    """Seconds a step of `train`, from the step `warm` to the last: by its own record."""
    with tempfile.TemporaryDirectory() as folder:
        train(dataclasses.replace(cfg, workdir=folder), corpus=corpus)
        seconds = {m["step"]: m["seconds"] for m in read_metrics(Path(folder), "train")}
    return (seconds[cfg.total_steps] - seconds[warm]) / (cfg.total_steps - warm)


def _step_seconds(cfg: TrainConfig, corpus: Corpus) -> float:
    """Seconds a step of the jitted step alone, on the first batch of the run, again and again."""
    mesh = make_mesh(cfg.mesh)
    bundle = starting_bundle(cfg, mesh)
    rows = corpus.training_rows(cfg.data, cfg.data.rows_per_step, cfg.seed)
    batch = next(batches(rows, rows_per_step=cfg.data.rows_per_step, first_step=0))
    context = make_context(cfg, 1, bundle.special.mask)
    step = make_train_step(cfg.of_step, bundle.config, "ar", mesh)  # the loop's own
    batch = place_batch(batch, mesh, rows=cfg.data.rows_per_step)
    context = jax.device_put(context, replicated(mesh))
    state, _ = step(init_state(cfg.of_step, bundle.params, mesh), batch, context)
    jax.block_until_ready(state)
    steps, started = cfg.total_steps - cfg.log_every, time.perf_counter()
    for _ in range(steps):
        state, _ = step(state, batch, context)
    jax.block_until_ready(state)
    return (time.perf_counter() - started) / steps


def main(argv: list[str]) -> None:
    """Prints the summary as JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m llada2_jax.bench overhead",
        description="Share of a training step that is not the model's: 1 - bare step / loop.",
    )
    parser.add_argument(
        "--config",
        default="configs/quickstart.py",
        metavar="FILE",
        help="of a run, or of a quickstart, whose `ar` stage is taken (default: "
        "configs/quickstart.py)",
    )
    parser.add_argument(
        "--steps", type=positive, default=30, metavar="N", help="timed a round (30)"
    )
    parser.add_argument(
        "--rounds", type=positive, default=3, metavar="N", help="of both in turns (3)"
    )
    args = parser.parse_args(argv)
    config: Any = load_config(args.config)
    cfg = validate(config.ar if "ar" in config else config)
    print(json.dumps(loop_overhead(cfg, steps=args.steps, rounds=args.rounds).summary(), indent=1))
