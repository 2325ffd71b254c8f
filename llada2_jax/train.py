"""Training: `llada2 train --config=configs/....py`, and the loop behind it.

    config -> rows -> step(state, batch, context) -> metrics, validation, checkpoints

The loop never waits for the device between steps: metrics are fetched `log_every` steps later.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx
from ml_collections import config_flags
from tokenizers import Tokenizer

from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.config import ConfigError, Phase, TrainConfig, validate
from llada2_jax.data.corpus import Corpus, load_corpus
from llada2_jax.data.loader import batches
from llada2_jax.evals.likelihood import validation_contexts
from llada2_jax.hub import load_model
from llada2_jax.hub.config import config_to_hf, special_tokens
from llada2_jax.hub.huggingface import read_tokenizer_files
from llada2_jax.metrics import MetricLogger
from llada2_jax.model import init_params
from llada2_jax.model.mask_embedding import mask_row
from llada2_jax.schedules import embedding_noise_sigma, learning_rate
from llada2_jax.train_checkpoints import TrainCheckpoints
from llada2_jax.train_step import (
    TrainState,
    evaluate,
    init_state,
    make_context,
    make_eval_step,
    make_grad_norms_by_rate,
    make_train_step,
    reset_moments,
)
from llada2_jax.types import Batch, ModelConfig


class TrainingStopped(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


def starting_bundle(cfg: TrainConfig) -> ModelBundle:
    """The model a run starts from: a checkpoint, or fresh parameters of config.model.

    Raises: CheckpointError or ConfigError that names what does not fit.
    """
    runtime = dataclasses.asdict(cfg.runtime)
    if cfg.init.checkpoint:
        mask_id = cfg.init.mask_id if cfg.init.mask_id >= 0 else None
        bundle = load_model(cfg.init.checkpoint, mask_id=mask_id, **runtime)
        return _describe(_initialise_mask(bundle, cfg), cfg)
    try:
        model = ModelConfig(**cfg.model, **runtime)
    except TypeError as error:
        raise ConfigError(f"config.model: {error}") from error
    files = read_tokenizer_files(Path(cfg.data.tokenizer))
    if "tokenizer.json" not in files:
        raise ConfigError(f"config.data.tokenizer={cfg.data.tokenizer!r} holds no tokenizer.json")
    special = special_tokens({"vocab_size": model.vocab_size}, files)
    hf_config = config_to_hf(model, special, model_type="bailing_moe_v2")
    params = init_params(model, cfg.seed)
    return ModelBundle(model, params, special, tokenizer_files=files, hf_config=hf_config)


def _describe(bundle: ModelBundle, cfg: TrainConfig) -> ModelBundle:
    """A run that ends in block diffusion makes an LLaDA2 of its parent, and says how to decode."""
    last = cfg.phases[-1]
    if last.objective == "ar":
        return bundle
    hf_config = config_to_hf(
        bundle.config, bundle.special, model_type="llada2_moe", base=bundle.hf_config
    )
    decode = {"block_size": last.block_size, "threshold": 0.95}
    decode["add_bos"] = bundle.special.bos is not None
    generation = bundle.generation | decode
    return dataclasses.replace(bundle, hf_config=hf_config, generation=generation)


def _initialise_mask(bundle: ModelBundle, cfg: TrainConfig) -> ModelBundle:
    if cfg.init.mask_embedding == "keep":
        return bundle
    params = jax.tree.map(lambda x: x, bundle.params)
    embedding = params["embedding"]
    table, mask = np.asarray(embedding[...]), bundle.special.mask
    row = mask_row(table, mask, cfg.init.mask_embedding, seed=cfg.seed)
    embedding[...] = jnp.asarray(table).at[mask].set(row)
    return dataclasses.replace(bundle, params=params)


@dataclasses.dataclass
class Run:
    """A training run in progress: what the loop needs at hand."""

    cfg: TrainConfig
    bundle: ModelBundle
    corpus: Corpus
    validation: list[Batch]
    checkpoints: TrainCheckpoints
    logger: MetricLogger
    state: TrainState
    steps: dict[str, Callable] = dataclasses.field(default_factory=dict)
    evals: dict[str, Callable] = dataclasses.field(default_factory=dict)

    def train_step(self, phase: Phase) -> Callable:
        if phase.objective not in self.steps:
            self.steps[phase.objective] = make_train_step(
                self.cfg, self.bundle.config, phase.objective
            )
        return self.steps[phase.objective]

    def validate(self, phase: Phase) -> dict[str, Any]:
        """Validation under the phase's objective (or at the target block size). `kind` says what
        was measured: only equal kinds compare."""
        objective, block_size = phase.objective, phase.block_size
        target = self.cfg.eval.target_block_size
        if objective != "ar" and target:
            objective, block_size = "bdlm", target
        if objective not in self.evals:
            self.evals[objective] = make_eval_step(self.bundle.config, objective)
        scores = evaluate(
            self.evals[objective],
            self.state.model_params,
            self.validation,
            validation_contexts(block_size, self.bundle.special.mask, self.cfg.eval.samples),
            self.corpus.token_bytes,
        )
        return {"kind": f"{phase.name}:{objective}-{block_size}", **scores}


def train(cfg: TrainConfig, *, corpus: Corpus | None = None, profile: str = "") -> ModelBundle:
    """Runs or resumes a training run; returns the final model.

    Args:
      cfg: from `config.validate`.
      corpus: the data, if the caller has it already.
      profile: folder for a trace of ten steps, taken once steps are warm; empty: none.

    Raises: ConfigError, CheckpointError, TrainingStopped.
    """
    run, first_step = _start(cfg, corpus)
    try:
        _loop(run, first_step, profile)
    finally:
        run.logger.close()
        run.checkpoints.close()
    return dataclasses.replace(run.bundle, params=run.state.model_params)


def _start(cfg: TrainConfig, corpus: Corpus | None) -> tuple[Run, int]:
    """A fresh run, or the newest checkpoint's."""
    workdir = Path(cfg.workdir)
    bundle = starting_bundle(cfg)
    _record_config(workdir, cfg)
    rows = cfg.data.rows_per_step // cfg.optimizer.accumulate
    try:
        if corpus is None:
            tokenizer = Tokenizer.from_str(bundle.tokenizer_files["tokenizer.json"])
            corpus = load_corpus(cfg.data, tokenizer, bundle.special)
        validation = corpus.validation_batches(cfg.data, cfg.eval.rows, rows)
    except ValueError as error:  # a source that is not there, or too few rows to validate on
        raise ConfigError(f"config: {error}") from error
    checkpoints = TrainCheckpoints(workdir, cfg.checkpoint)
    state, first_step = init_state(cfg, bundle.params), 0
    latest = checkpoints.latest
    if latest is not None:
        state, first_step = _restore(checkpoints, latest, state)
    logger = MetricLogger(
        workdir,
        total_steps=cfg.total_steps,
        first_step=first_step,
        tokens_per_step=cfg.tokens_per_step,
        label=workdir.name,
    )
    if first_step:
        logger.say(f"resuming {workdir} after step {first_step} of {cfg.total_steps}")
    bundle = dataclasses.replace(bundle, params=None)
    return Run(cfg, bundle, corpus, validation, checkpoints, logger, state), first_step


def _record_config(workdir: Path, cfg: TrainConfig) -> None:
    """Writes config.json once; a resumed run must have been started with the same config.

    `log_every` and `checkpoint` do not change what is computed and may differ.
    """
    free = ("log_every", "checkpoint", "workdir")
    described = json.loads(json.dumps(dataclasses.asdict(cfg)))
    path = workdir / "config.json"
    if path.exists():
        before = json.loads(path.read_text())
        changed = [k for k in described if k not in free and before.get(k) != described[k]]
        if changed:
            raise ConfigError(
                f"{workdir} holds a run with another config.{changed[0]}: "
                f"{before.get(changed[0])} there, {described[changed[0]]} now; "
                "choose another workdir, or remove it to start again"
            )
    workdir.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(described, indent=1))


def _counters(state: TrainState) -> tuple:
    return state.opt_state, state.step, state.skipped_in_a_row, state.skipped


def _restore(checkpoints: TrainCheckpoints, step: int, state: TrainState) -> tuple[TrainState, int]:
    params, counters, train = checkpoints.restore(step, state.model_params, _counters(state))
    trained, buffers = nnx.split_state(params, nnx.Param, ...)
    opt_state, taken, in_a_row, skipped = counters
    return TrainState(taken, trained, buffers, opt_state, in_a_row, skipped), train["step"]


def _loop(run: Run, first_step: int, profile: str) -> None:
    """Steps first_step .. total_steps, each logged, and now and then validated and saved."""
    cfg, logger = run.cfg, run.logger
    rows = run.corpus.training_rows(cfg.data, cfg.total_steps * cfg.data.rows_per_step, cfg.seed)
    source = batches(rows, rows_per_step=cfg.data.rows_per_step, first_step=first_step)
    pending: list[tuple[int, Phase, dict]] = []
    waited, clock = 0.0, time.perf_counter()
    for step in range(first_step, cfg.total_steps):
        index, phase = cfg.phase_at(step)
        _profile(profile, step - first_step)
        before = time.perf_counter()
        batch = next(source)
        # Only an idle device waits: while it computes, input is prepared at no cost.
        if not pending or pending[-1][2]["loss"].is_ready():
            waited += time.perf_counter() - before
        if cfg.optimizer.reset_each_phase and _phase_starts(cfg, step):
            run.state = reset_moments(run.state)
        context = make_context(
            cfg,
            phase.block_size,
            run.bundle.special.mask,
            sigma=embedding_noise_sigma(cfg, step),
        )
        run.state, metrics = run.train_step(phase)(run.state, batch, context)
        pending.append((step + 1, phase, metrics))
        done, ends = step + 1, _phase_starts(cfg, step + 1)
        if len(pending) >= cfg.log_every or ends:
            _log(run, pending, waited, time.perf_counter() - clock)
            pending, waited, clock = [], 0.0, time.perf_counter()
        if ends or _due(cfg, cfg.eval.every_tokens, done) or _save_due(cfg, done):
            _validate_and_save(run, done, index, phase, batch, context, ends=ends)
            clock = time.perf_counter()
    logger.advance(0, "done")


def _phase_starts(cfg: TrainConfig, step: int) -> bool:
    """Whether `step` is the first of a phase, or the end of the run."""
    return step >= cfg.total_steps or (step > 0 and cfg.phase_at(step) != cfg.phase_at(step - 1))


def _due(cfg: TrainConfig, every_tokens: int, step: int) -> bool:
    """Whether a multiple of `every_tokens` was passed by step `step`."""
    tokens = cfg.tokens_per_step
    return (
        bool(every_tokens) and step * tokens // every_tokens > (step - 1) * tokens // every_tokens
    )


def _save_due(cfg: TrainConfig, step: int) -> bool:
    return _due(cfg, cfg.checkpoint.every_tokens, step)


def _log(run: Run, pending: list, waited: float, elapsed: float) -> None:
    """Fetches the metrics of the last steps (here the host waits) and writes them."""
    cfg, rate = run.cfg, learning_rate(run.cfg.optimizer, run.cfg.total_steps)
    steps, fetched = len(pending), []
    for step, phase, metrics in pending:
        values = {k: float(v) for k, v in jax.device_get(metrics).items()}
        fetched.append(values)
        extra = {"learning_rate": float(np.asarray(rate(step - 1))), "block_size": phase.block_size}
        extra["embedding_noise"] = embedding_noise_sigma(cfg, step - 1)
        if step == pending[-1][0]:
            extra["tokens_per_second"] = steps * cfg.tokens_per_step / elapsed
            extra["input_wait_fraction"] = waited / elapsed
        run.logger.write(step, "train", phase.name, values | extra)
    last = fetched[-1]
    shown = {"loss": sum(f["loss"] for f in fetched) / steps, "grad": last["grad_norm"]}
    if last["skipped"]:
        shown["skipped"] = last["skipped"]
    run.logger.advance(steps, pending[-1][1].name, **shown)
    worst = max(f["skipped_in_a_row"] for f in fetched)
    if worst >= cfg.optimizer.max_consecutive_skips:
        raise TrainingStopped(
            f"the loss or gradient was not finite in {worst:.0f} steps in a row (step "
            f"{pending[-1][0]}, phase {pending[-1][1].name}): parameters are as before the first "
            "of them; lower optimizer.learning_rate, or look at the data of these steps"
        )


def _validate_and_save(
    run: Run, step: int, index: int, phase: Phase, batch: Batch, context, *, ends: bool
) -> None:
    cfg = run.cfg
    scores = run.validate(phase)
    if ends and cfg.eval.rate_buckets and phase.objective != "ar":
        norms = make_grad_norms_by_rate(run.bundle.config, phase.objective, cfg.eval.rate_buckets)(
            run.state, _first_micro_batch(batch, cfg.optimizer.accumulate), context
        )
        run.logger.write(
            step, "grad_norm_by_rate", phase.name, {"norms": [float(n) for n in norms]}
        )
    run.logger.write(step, "validation", phase.name, scores | {"block_size": phase.block_size})
    run.logger.say(
        f"step {step:>6}  {phase.name:<12} validation {scores['bits_per_byte']:.4f} "
        f"± {scores['bits_per_byte_stderr']:.4f} bits/byte ({scores['kind']})"
    )
    if not (ends or _save_due(cfg, step)):
        return
    train_item = {
        "step": step,
        "phase": phase.name,
        "phase_index": index,
        "metrics": {"validation": scores},
        "data": {"next_row": step * cfg.data.rows_per_step},
    }
    provenance = {"run": cfg.workdir, "step": step, "phase": phase.name}
    bundle = dataclasses.replace(run.bundle, provenance=provenance)
    run.checkpoints.save(step, bundle, run.state.model_params, _counters(run.state), train_item)


def _first_micro_batch(batch: Batch, accumulate: int) -> Batch:
    return jax.tree.map(lambda x: x[: x.shape[0] // accumulate], batch)


def _profile(folder: str, step: int, *, first: int = 5, steps: int = 10) -> None:
    """Starts and stops the trace; a no-op without a folder."""
    if folder and step == first:
        jax.profiler.start_trace(folder)
    if folder and step == first + steps:
        jax.profiler.stop_trace()


# What a user can put right; OSError is how ml_collections says that a config file does not exist.
MISTAKES = (ConfigError, CheckpointError, TrainingStopped, flags.Error, OSError)


def parse_flags(
    command: str, argv: list[str], *, config: str | None = None, **texts: str
) -> flags.FlagValues:
    """The flags of a command that runs a config: --config (by default the file `config`) with its
    overrides, --workdir, which goes into the config, --print_config, and `texts`: {name: help}.

    Raises: what MISTAKES lists.
    """
    values = flags.FlagValues()
    arguments = [command, *argv]  # not sys.argv, which is another caller's
    flags.DEFINE_boolean("print_config", False, "print the config and stop", flag_values=values)
    for name, about in {"workdir": "overrides config.workdir", **texts}.items():
        flags.DEFINE_string(name, "", about, flag_values=values)
    try:
        config_flags.DEFINE_config_file("config", config, flag_values=values, sys_argv=arguments)
        values(arguments)
    except AttributeError as error:  # how ml_collections says that a field does not exist
        reason = error.args[0].args[0] if isinstance(error.args[0], KeyError) else error
        raise ConfigError(f"the config has no field {reason}") from error
    if values.config is None:
        raise ConfigError("--config is missing: name a file of configs/")
    if values.workdir:
        values.config.workdir = values.workdir
    return values


def main(argv: list[str]) -> int:
    """`llada2 train`."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP)
        return 0 if argv else 2
    try:
        values = parse_flags("llada2 train", argv, profile="folder for a trace of ten warm steps")
        if values.print_config:
            print(values.config)
            return 0
        train(validate(values.config), profile=values.profile)
    except MISTAKES as error:
        print(f"llada2 train: {error}", file=sys.stderr)
        return 1
    return 0


_HELP = """\
usage: llada2 train --config=configs/NAME.py [--config.FIELD=VALUE ...] [--workdir DIR]
                    [--profile DIR] [--print_config]

Trains what the config says: autoregressive, block diffusion, or the whole
Warmup-Stable-Decay conversion. A run found in the workdir is resumed, bit for bit.

  --config=FILE          a file of configs/ (each docstring says what it takes and gave)
  --config.a.b=c         overrides a field; an unknown field is an error
  --workdir=DIR          same as --config.workdir
  --profile=DIR          writes a trace of ten warm steps for XProf / Perfetto
  --print_config         prints every field with its value and stops

examples:
  llada2 train --config=configs/tiny_wsd.py --config.schedule.stable_tokens=2000000
  llada2 train --config=configs/tiny_wsd.py --workdir=runs/seed1 --config.seed=1

Exit status: 0, or 1 with the reason.
"""
