"""Training: `llada2 train --config=configs/....py`, and the loop behind it.

    config -> rows -> step(state, batch, context) -> metrics, validation, checkpoints

The loop never waits for the device between steps: metrics are fetched `log_every` steps later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from llada2_jax.adapters import add_adapters, split_trained, without_adapters
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import EVENTS, ConfigError, Phase, TrainConfig
from llada2_jax.config_check import validate
from llada2_jax.config_flags import parse_flags
from llada2_jax.data.corpus import Corpus, load_corpus
from llada2_jax.data.loader import batches
from llada2_jax.distributed import joined
from llada2_jax.errors import EXIT_STATUS, UserError
from llada2_jax.evals.likelihood import preference_context, validation_contexts
from llada2_jax.evals.validation import score_pairs, score_rows, validated
from llada2_jax.metrics import MetricLogger
from llada2_jax.objectives import Context
from llada2_jax.preemption import Preempted, PreemptionNotice
from llada2_jax.reference import (
    cached_bounds,
    fetched,
    load_reference,
    make_reference_step,
    place,
)
from llada2_jax.retry import with_retries
from llada2_jax.run_folder import record_config, record_start
from llada2_jax.schedules import embedding_noise_sigma, learning_rate
from llada2_jax.sharding import (
    format_placements,
    local_rows,
    make_mesh,
    place_batch,
    placements,
)
from llada2_jax.starting_model import starting_bundle, with_learning_rate
from llada2_jax.train_checkpoints import TrainCheckpoints
from llada2_jax.train_step import (
    TrainState,
    abstract_state,
    begin_phase,
    init_state,
    make_context,
    make_eval_step,
    make_grad_norms_by_rate,
    make_train_step,
    roll_back,
)
from llada2_jax.types import Batch, ModelConfig, Params
from pallas_kernels.block_layout import block_index, both_halves, zigzag_imbalance


class TrainingStopped(UserError, RuntimeError):
    """Training cannot go on; the message says why and what to do."""


# Gives rows the bounds of the reference, if they lack them.
Refer = Callable[[TrainState, Batch, Context], Batch]


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
    mesh: Mesh
    refer: Refer
    rollback_to: int = 0  # the last step that the schedule or a rollback saved, whatever else was
    waits_until: int = 0  # checkpoints up to here are waited for: they were lost once
    latest: dict[str, Any] = dataclasses.field(default_factory=dict)  # metrics of the last step

    def train_step(self, phase: Phase) -> Callable:
        return make_train_step(self.cfg.of_step, self.bundle.config, phase.objective, self.mesh)

    def grad_norms_by_rate(self, phase: Phase) -> Callable:
        return make_grad_norms_by_rate(
            self.bundle.config, phase.objective, self.cfg.eval.rate_buckets, self.mesh
        )

    def validate(self, phase: Phase) -> dict[str, Any]:
        """Validation of the phase. `kind` says what was measured: only equal kinds compare."""
        objective, block_size = validated(self.cfg, phase.objective, phase.block_size)
        step = make_eval_step(self.bundle.config, objective, self.mesh)
        rows = step, self.state.model_params, self.validation
        mask = self.bundle.special.mask
        if objective == "dpo":
            figures = score_pairs(*rows, preference_context(self.cfg, mask))
        else:
            contexts = validation_contexts(block_size, mask, self.cfg.eval.samples)
            figures = score_rows(*rows, contexts, self.corpus.token_bytes).figures()
        return {"kind": f"{phase.name}:{objective}-{block_size}", **figures}


def train(cfg: TrainConfig, *, corpus: Corpus | None = None, profile: str = "") -> ModelBundle:
    """Runs or resumes a training run; returns the final model.

    Args:
      cfg: from `config_check.validate`.
      corpus: the data, if the caller has it already.
      profile: folder for a trace of ten steps, taken once steps are warm, or of as many as the run
        still has; empty: none.

    Raises: ConfigError, CheckpointError, TrainingStopped, StorageError; Preempted (a SystemExit)
      after a notice of preemption.
    """
    with PreemptionNotice(cfg.checkpoint.preemption_seconds) as notice:
        run, first_step = _start(cfg, corpus)
        try:
            with contextlib.closing(_Trace(profile, run.logger.say)) as trace:
                step = first_step
                while step < cfg.total_steps:
                    step = _loop(run, step, notice, trace)
                _finish(run)
        finally:
            run.checkpoints.close()
            run.logger.close()
    return without_adapters(dataclasses.replace(run.bundle, params=run.state.model_params))


def _start(cfg: TrainConfig, corpus: Corpus | None) -> tuple[Run, int]:
    """A fresh run, or the newest checkpoint's."""
    workdir = Path(cfg.workdir)
    cfg = with_learning_rate(cfg)
    mesh = make_mesh(cfg.mesh)
    bundle = starting_bundle(cfg, mesh)
    dpo = cfg.phases[0].objective == "dpo"
    reference = load_reference(cfg, bundle, mesh) if dpo else None
    parent = bundle.provenance.get("checksums")
    if cfg.lora.rank:
        path = str(Path(cfg.init.checkpoint).resolve())
        bundle = add_adapters(bundle, cfg.lora, path=path, seed=cfg.seed, mesh=mesh)
    rows = cfg.data.rows_per_step // cfg.optimizer.accumulate
    try:
        if corpus is None:
            where = f"init.checkpoint={cfg.init.checkpoint!r}"
            tokenizer = Tokenizer.from_str(bundle.tokenizer_json(where))
            corpus = load_corpus(cfg.data, tokenizer, bundle.special)
        _check_readable(cfg, corpus)
        validation = corpus.validation_batches(cfg.data, cfg.eval.rows, rows)
        data = corpus.description(cfg.data)
    except ValueError as error:  # a source that is not there, or too few rows to validate on
        raise ConfigError(f"config: {error}") from error
    if jax.process_index() == 0:
        other = reference.checksums() if reference and cfg.reference.checkpoint else None
        record = functools.partial(
            record_config,
            workdir,
            cfg,
            parent=parent,
            reference_model=other,
            corpus=corpus.digests(),
        )
        _stored(cfg, record, f"writing {workdir}/config.json")
    corpus, validation, refer = _refer(cfg, reference, corpus, validation, mesh)
    checkpoints = TrainCheckpoints(workdir, cfg.checkpoint, tokens_per_step=cfg.tokens_per_step)
    if checkpoints.lost:
        raise ConfigError(
            f"{workdir} has saved checkpoints, but {checkpoints.folder} has none: bring them back, "
            "or choose another workdir to begin anew"
        )
    state = base = restored = None
    if cfg.lora.rank or not checkpoints.newest:
        state = init_state(cfg.of_step, bundle.params, mesh)
        base = state.buffers if cfg.lora.rank else None
    bundle = dataclasses.replace(bundle, params=None)
    if checkpoints.newest:
        state = None  # with the model it began with: there may be no room for two states
        restored = _restored(cfg, checkpoints, bundle.config, mesh, base)
    state, first_step, rollback_to = restored or (state, 0, 0)
    assert state is not None
    logger = MetricLogger(
        workdir,
        total_steps=cfg.total_steps,
        first_step=first_step,
        tokens_per_step=cfg.tokens_per_step,
        label=workdir.name,
        retry_seconds=cfg.checkpoint.retry_seconds,
        wandb_project=cfg.wandb_project,
        config=dataclasses.asdict(cfg),
        write=jax.process_index() == 0,
    )
    if jax.process_index() == 0:
        start = functools.partial(
            record_start, workdir, step=first_step, params=state.params, data=data
        )
        _stored(cfg, start, f"writing {workdir}/starts.jsonl")
    _report_placement(cfg, logger, state, validation, mesh)
    if first_step:
        logger.say(f"resuming {workdir} after step {first_step} of {cfg.total_steps}")
    run = Run(cfg, bundle, corpus, validation, checkpoints, logger, state, mesh, refer, rollback_to)
    return run, first_step


def _report_placement(
    cfg: TrainConfig, logger: MetricLogger, state: TrainState, validation: list[Batch], mesh: Mesh
) -> None:
    """Says what each device of a mesh holds."""
    if mesh.size == 1:
        return
    params, rest = placements(state.model_params, mesh), placements(state.opt_state, mesh)
    sizes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1)
    moments = sum(place.bytes_per_device for place in rest) / 2**20
    logger.say(
        f"{mesh.size} devices: {sizes}\n{format_placements(params)}\n"
        f"and {moments:.2f} MiB of optimizer state a device"
    )
    ways = mesh.shape["context"]
    if ways > 1:
        worst = _context_imbalance(cfg, validation, ways)
        logger.say(
            f"context {ways}: the busiest device of a validation row has {worst:.3f} times the "
            "query-key pairs of the mean one"
        )


def _context_imbalance(cfg: TrainConfig, validation: list[Batch], ways: int) -> float:
    """Mean over validation rows, at the last phase's block size."""
    size, anchor = cfg.phases[-1].block_size, cfg.data.block_anchor
    found = []
    for batch in validation:
        block = block_index(batch.positions, size, anchor)
        found.append(zigzag_imbalance(both_halves(block, batch.segment_ids), ways))
    return float(np.mean(found))


def _refer(
    cfg: TrainConfig,
    reference: ModelBundle | None,
    corpus: Corpus,
    validation: list[Batch],
    mesh: Mesh,
) -> tuple[Corpus, list[Batch], Refer]:
    """Gives the rows of a run the bounds of the reference: the validation rows now; those for
    training in the corpus, if they are cached, or else by the function that is returned."""
    if reference is None:
        return corpus, validation, lambda state, batch, context: batch
    if cfg.reference.cache:
        context = make_context(cfg, cfg.schedule.posttrain_block, reference.special.mask)
        corpus = cached_bounds(cfg, reference, corpus, context, mesh)
    held_out = preference_context(cfg, reference.special.mask)
    step = make_reference_step(reference.config, 1, mesh)
    validation = [
        dataclasses.replace(batch, reference=fetched(step, reference.params, batch, held_out, mesh))
        for batch in validation
    ]
    if cfg.reference.cache:
        return corpus, validation, lambda state, batch, context: batch
    step = make_reference_step(reference.config, cfg.optimizer.accumulate, mesh)
    shared = cfg.lora.rank > 0 and not cfg.reference.checkpoint
    params = None if shared else place(reference.params, cfg.reference.memory)

    def refer(state: TrainState, batch: Batch, context: Context) -> Batch:
        bounds = step(state.buffers if shared else params, batch, context)
        return dataclasses.replace(batch, reference=bounds)

    return corpus, validation, refer


def _check_readable(cfg: TrainConfig, corpus: Corpus) -> None:
    """Preference pairs are for the objective that reads them; the others would take no notice."""
    if cfg.phases[0].objective == "dpo":
        _check_pairs(corpus)
        return
    for source in corpus.sources:
        if source.train.paired:
            raise ConfigError(
                f"config.data.sources: {source.name} holds preference pairs, which only "
                "schedule.dpo_tokens is for: prepare it as chats"
            )


def _check_pairs(corpus: Corpus) -> None:
    for source in corpus.sources:
        if not source.train.paired or source.train.weighted:
            what = (
                "no preference pairs" if not source.train.paired else "other weights than 0 and 1"
            )
            raise ConfigError(
                f"config.data.sources: {source.name} holds {what}; dpo reads pairs without "
                "weights: llada2 data prepare --content preference"
            )


def _stored(cfg: TrainConfig, action: Callable[[], None], what: str) -> None:
    with_retries(action, what, seconds=cfg.checkpoint.retry_seconds)


def _restored(
    cfg: TrainConfig,
    checkpoints: TrainCheckpoints,
    model: ModelConfig,
    mesh: Mesh,
    base: Params | None,
    before: int | None = None,
) -> tuple[TrainState, int, int] | None:
    """The newest checkpoint's state, placed on the mesh, its step, and its `Run.rollback_to`.

    base: the buffers under adapters, which checkpoints do not hold.
    Raises: ConfigError where the data would not go on at the row that comes next.
    """
    like = abstract_state(cfg.of_step, model, mesh)
    found = checkpoints.restore_newest(like.saved_params, like.beside_params, before=before)
    if found is None:
        return None
    params, rest, train_item = found
    step, next_row = train_item["step"], train_item["data"]["next_row"]
    rows = cfg.data.rows_per_step
    if next_row != step * rows:
        raise ConfigError(
            f"{cfg.workdir}: checkpoint {step} goes on at row {next_row} of the data, but "
            f"config.data.rows_per_step={rows} puts it at {step * rows}: set it to "
            f"{next_row // step}, or choose another workdir"
        )
    trained, buffers = (params, base) if cfg.lora.rank else split_trained(params)
    state = dataclasses.replace(rest, params=trained, buffers=buffers)
    return state, step, train_item.get("rollback_to", step)  # absent where it was not known yet


@dataclasses.dataclass
class _Pending:
    """Steps whose metrics are still on the device, and what the host waited for meanwhile."""

    steps: list[tuple[int, Phase, dict]] = dataclasses.field(default_factory=list)
    input_wait: float = 0.0
    since: float = dataclasses.field(default_factory=time.perf_counter)

    def next(self, source: Iterator[Batch]) -> Batch:
        before = time.perf_counter()
        batch = next(source)
        # Only an idle device waits: while it computes, input is prepared at no cost.
        if not self.steps or self.steps[-1][2]["loss"].is_ready():
            self.input_wait += time.perf_counter() - before
        return batch


def _loop(run: Run, first_step: int, notice: PreemptionNotice, trace: _Trace) -> int:
    """Steps first_step .. total_steps, each logged, and now and then validated and saved.

    Returns the step to go on from: total_steps, or an earlier one (see `_react`).
    """
    cfg = run.cfg
    rows = run.corpus.training_rows(cfg.data, cfg.total_steps * cfg.data.rows_per_step, cfg.seed)
    per_step = cfg.data.rows_per_step
    share = local_rows(run.mesh, per_step)
    source = batches(rows, rows_per_step=per_step, first_step=first_step, share=share)
    pending = _Pending()
    for step in range(first_step, cfg.total_steps):
        if notice.reached(step):
            _leave(run, step, pending, saved=step == first_step)
        _, phase = cfg.phase_at(step)
        batch = place_batch(pending.next(source), run.mesh, rows=per_step)
        if _phase_starts(cfg, step):
            run.state = begin_phase(cfg.of_step, run.state)
        context = make_context(
            cfg,
            phase.block_size,
            run.bundle.special.mask,
            sigma=embedding_noise_sigma(cfg, step),
        )
        batch = run.refer(run.state, batch, context)
        run.state, metrics = run.train_step(phase)(run.state, batch, context)
        trace.after(metrics)
        pending.steps.append((step + 1, phase, metrics))
        done, ends = step + 1, _phase_starts(cfg, step + 1)
        saves = saves_after(cfg, done)
        measures = saves or _due(cfg, cfg.eval.every_tokens, done)
        # Where the host looks depends on the step alone, so that a resumed run reacts to the same.
        if measures or done % cfg.log_every == 0:
            event = _log(run, pending)
            if event is not None and (earlier := _react(run, done, *event)) < done:
                return earlier
            scores = _validate(run, done, phase, batch, context, ends=ends) if measures else None
            if saves or event is not None:
                run.rollback_to = done
            if run.rollback_to == done or run.checkpoints.failed:
                _save(run, done, scores, wait=done <= run.waits_until)
            pending = _Pending()
    return cfg.total_steps


def _finish(run: Run) -> None:
    run.checkpoints.wait()
    if run.checkpoints.failed:
        _save(run, run.cfg.total_steps)
    run.logger.advance(0, "done")


def _leave(run: Run, step: int, pending: _Pending, *, saved: bool) -> NoReturn:
    """Saves, unless the steps since the last look are bound to be rolled back, and makes room."""
    if not saved and (not pending.steps or _log(run, pending) is None):
        _save(run, step, wait=True)
    saved_step, last = run.checkpoints.newest, run.cfg.total_steps
    message = f"preempted: step {saved_step} of {last} is saved; start again to go on"
    run.logger.say(message)
    raise Preempted(message)


def saves_after(cfg: TrainConfig, step: int) -> bool:
    """Whether the run is validated and saved when `step` steps are done."""
    return _phase_starts(cfg, step) or _due(cfg, cfg.checkpoint.every_tokens, step)


def _phase_starts(cfg: TrainConfig, step: int) -> bool:
    """Whether `step` is the first of a phase, or the end of the run."""
    return step >= cfg.total_steps or (step > 0 and cfg.phase_at(step) != cfg.phase_at(step - 1))


def _due(cfg: TrainConfig, every_tokens: int, step: int) -> bool:
    """Whether a multiple of `every_tokens` was passed by step `step`."""
    tokens = cfg.tokens_per_step
    return (
        bool(every_tokens) and step * tokens // every_tokens > (step - 1) * tokens // every_tokens
    )


def _log(run: Run, pending: _Pending) -> tuple[str, str, int] | None:
    """Fetches the metrics of the last steps (here the host waits) and writes them.

    Returns (policy, event, step) for the first step that calls for more than being skipped.
    """
    cfg, rate = run.cfg, learning_rate(run.cfg.optimizer, run.cfg.total_steps)
    steps, called_for = len(pending.steps), None
    fetched = [_scalars(jax.device_get(metrics)) for *_, metrics in pending.steps]
    elapsed = time.perf_counter() - pending.since
    for (step, phase, _), values in zip(pending.steps, fetched, strict=True):
        called_for = called_for or _call(cfg, step, values)
        values = {k: v for k, v in values.items() if v or not k.startswith("spike_")}
        extra = {"learning_rate": float(np.asarray(rate(step - 1))), "block_size": phase.block_size}
        extra["embedding_noise"] = embedding_noise_sigma(cfg, step - 1)
        if step == pending.steps[-1][0]:
            extra["tokens_per_second"] = steps * cfg.tokens_per_step / elapsed
            extra["input_wait_fraction"] = pending.input_wait / elapsed
        run.logger.write(step, "train", phase.name, values | extra)
    last, (step, phase, _) = fetched[-1], pending.steps[-1]
    run.latest = {"kind": phase.name, **last}
    shown = {"loss": sum(f["loss"] for f in fetched) / steps, "grad": last["grad_norm"]}
    if last["skipped"]:
        shown["skipped"] = last["skipped"]
    run.logger.advance(steps, phase.name, **shown)
    stuck = max(fetched, key=lambda f: f["skipped_in_a_row"])
    worst = stuck["skipped_in_a_row"]
    if called_for is None and worst >= cfg.optimizer.max_consecutive_skips:
        raise TrainingStopped(
            f"{worst:.0f} steps in a row were skipped (step {step}, phase {phase.name}: "
            f"{_reasons(stuck)}): parameters are as before the first of them; lower "
            "optimizer.learning_rate, look at the data of these steps, or, where experts had no "
            "room, raise runtime.expert_buffer"
        )
    return called_for


def _reasons(values: dict[str, float]) -> str:
    """What a step was skipped for."""
    return ", ".join(event for event in EVENTS if values[f"spike_{event}"])


def _scalars(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """As they are logged: what has a value a layer is `name/0`, `name/1`, ..., and `name`, the
    largest."""
    found = {}
    for name, value in metrics.items():
        if np.ndim(value):
            found |= {f"{name}/{i}": float(x) for i, x in enumerate(value)}
        if np.size(value):
            found[name] = float(np.max(value))
    return found


def _call(cfg: TrainConfig, step: int, values: dict[str, float]) -> tuple[str, str, int] | None:
    """(policy, event, step) where a step was one that the config does not just skip."""
    for event in EVENTS:
        policy = getattr(cfg.spikes, event)
        if values[f"spike_{event}"] and policy in ("rollback", "stop"):
            return policy, event, step
    return None


def _react(run: Run, done: int, policy: str, event: str, step: int) -> int:
    """Rolls back to `run.rollback_to` and skips all steps from there to `done`, or stops.

    Returns the step to go on from: `done`; or, where that checkpoint was lost, that of the one
    before it. The steps since are taken again then, as after a restart, and lead to this very
    rollback with all that it needs, so that no fault shows in where a run goes back to.
    """
    spikes, target = run.cfg.spikes, run.rollback_to
    what = f"spikes.{event}={policy!r} was called for by step {step}"
    if policy == "stop":
        room = "give experts more room (config.runtime.expert_buffer; 0: the worst case), or "
        more = room if event == "expert_overflow" else ""
        raise TrainingStopped(
            f"{what}; {more}start again with another policy to go on from before it"
        )
    if int(run.state.rollbacks) >= spikes.max_rollbacks:
        raise TrainingStopped(
            f"{what}, but the run went back spikes.max_rollbacks={spikes.max_rollbacks} times "
            "already; lower optimizer.learning_rate, or look at the data of these steps"
        )
    base = run.state.buffers if run.cfg.lora.rank else None
    run.latest = {}  # they are of a step that is undone
    # Freed first: there may be no room for two states.
    run.state = dataclasses.replace(run.state, params=None, buffers=None, opt_state=None)
    model = run.bundle.config
    found = _restored(run.cfg, run.checkpoints, model, run.mesh, base, before=target + 1)
    if found is None:
        raise TrainingStopped(f"{what}, but there is no checkpoint before it to go back to")
    earlier, source, rollback_to = found
    name = run.cfg.phase_at(done - 1)[1].name
    if source < target:
        run.state, run.rollback_to = earlier, rollback_to
        run.waits_until = target
        run.checkpoints.discard_after(source)
        run.logger.cut_back(source)
        run.logger.advance(source - done, name)
        run.logger.say(f"{what}: checkpoint {target} is lost, taking the steps from {source} again")
        return source
    run.state = roll_back(run.state, earlier)
    run.logger.cut_back(source)
    values = {"event": event, "spike_step": step, "restored_step": source}
    run.logger.write(done, "rollback", name, values)
    run.logger.say(f"{what}: back to checkpoint {source}, skipping the steps up to {done}")
    return done


def _validate(
    run: Run, step: int, phase: Phase, batch: Batch, context: Context, *, ends: bool
) -> dict[str, Any]:
    cfg = run.cfg
    scores = run.validate(phase)
    if ends and cfg.eval.rate_buckets and phase.objective not in ("ar", "dpo"):
        first = _first_micro_batch(batch, cfg.optimizer.accumulate)
        norms = run.grad_norms_by_rate(phase)(run.state, first, context)
        run.logger.write(
            step, "grad_norm_by_rate", phase.name, {"norms": [float(n) for n in norms]}
        )
    line = {("measured" if name == "kind" else name): value for name, value in scores.items()}
    run.logger.write(step, "validation", phase.name, line | {"block_size": phase.block_size})
    run.logger.say(f"step {step:>6}  {phase.name:<12} validation {_shown(scores)}")
    return scores


def _shown(scores: dict[str, Any]) -> str:
    if "bits_per_byte" not in scores:
        return (
            f"loss {scores['loss']:.4f}, accuracy {scores['reward_accuracy']:.3f}, margin "
            f"{scores['reward_margin']:.3f} on {scores['pairs']:.0f} pairs ({scores['kind']})"
        )
    return (
        f"{scores['bits_per_byte']:.4f} ± {scores['bits_per_byte_stderr']:.4f} bits/byte "
        f"({scores['kind']})"
    )


def _save(run: Run, step: int, scores: dict[str, Any] | None = None, *, wait: bool = False) -> None:
    """Checkpoint `step`; without scores where nothing was measured."""
    cfg = run.cfg
    index, phase = cfg.phase_at(step - 1)
    train_item = {
        "step": step,
        "phase": phase.name,
        "phase_index": index,
        "metrics": {"train": run.latest} | ({"validation": scores} if scores else {}),
        "rollback_to": run.rollback_to,
        "data": {"next_row": step * cfg.data.rows_per_step},
        "seed": cfg.seed,  # with the documents' ids and visits, all there is to randomness
    }
    rate = float(np.asarray(learning_rate(cfg.optimizer, cfg.total_steps)(step - 1)))
    provenance = {
        "run": cfg.workdir,
        "step": step,
        "phase": phase.name,
        "row_length": cfg.data.row_length,
        "learning_rate": rate,
    }
    bundle = dataclasses.replace(run.bundle, provenance=provenance)
    run.logger.sync()
    state = run.state
    run.checkpoints.save(
        step, bundle, state.saved_params, state.beside_params, train_item, wait=wait
    )


def _first_micro_batch(batch: Batch, accumulate: int) -> Batch:
    return jax.tree.map(lambda x: x[: x.shape[0] // accumulate], batch)


class _Trace:
    """A profiler trace of ten steps, once steps are warm; nothing without a folder.

    The device is idle at both ends, so that it holds whole steps. `close` ends a trace that the run
    did not, and says so if there was none to take.
    """

    WARM, STEPS = 5, 10

    def __init__(self, folder: str, say: Callable[[str], None]):
        self._folder, self._say = folder, say
        self._done, self._running = 0, False
        self._last: Any = None

    def after(self, metrics: Any) -> None:
        """Call after each step was dispatched; metrics: any of its results, not donated."""
        self._done, self._last = self._done + 1, metrics
        if self._folder and self._done == self.WARM:
            jax.block_until_ready(metrics)
            jax.profiler.start_trace(self._folder)
            self._running = True
        elif self._done == self.WARM + self.STEPS:
            self._stop()

    def _stop(self) -> None:
        if not self._running:
            return
        self._running = False
        try:
            jax.block_until_ready(self._last)
        finally:
            jax.profiler.stop_trace()
        steps = min(self._done - self.WARM, self.STEPS)
        self._say(f"a trace of {steps} steps is in {self._folder}")

    def close(self) -> None:
        self._stop()
        if self._folder and self._done < self.WARM:
            self._say(
                f"no trace in {self._folder}: it begins after {self.WARM} steps, and this start "
                f"took {self._done}"
            )


def main(argv: list[str]) -> int:
    """`llada2 train`."""
    if not argv or {"-h", "--help"} & set(argv):
        print(_HELP)
        return 0 if argv else 2
    values = parse_flags("llada2 train", argv, profile="folder for a trace of ten warm steps")
    if values.print_config:
        print(values.config)
        return 0
    cfg = validate(values.config)
    with joined(cfg.distributed, (UserError, OSError)):
        train(cfg, profile=values.profile)
    return 0


_HELP = f"""\
usage: llada2 train --config=configs/NAME.py [--config.FIELD=VALUE ...] [--workdir DIR]
                    [--profile DIR] [--print_config]

Trains what the config says: autoregressive, block diffusion, the whole
Warmup-Stable-Decay conversion, or post-training (SFT, CAP, DPO). A run found in
the workdir is resumed, bit for bit.

  --config=FILE          a file of configs/ (each docstring says what it takes and gave)
  --config=FILE:MODEL    the file for another model: configs/sft.py:mini, configs/dpo.py:flash
  --config.a.b=c         overrides a field; an unknown field is an error
  --workdir=DIR          same as --config.workdir
  --profile=DIR          writes a trace of ten warm steps for XProf / Perfetto
  --print_config         prints every field with its value and stops

examples:
  llada2 train --config=configs/tiny_wsd.py --config.schedule.stable_tokens=2000000
  llada2 train --config=configs/tiny_wsd.py --workdir=runs/seed1 --config.seed=1
  llada2 train --config=configs/sft.py --config.data.sources='("data/chat",)'
  llada2 train --config=configs/dpo.py:mini --config.init.checkpoint=runs/cap_mini/merged

{EXIT_STATUS}75 after SIGTERM or a notice of preemption, when what was reached is saved and the
same command goes on.
"""
