"""What a config may say. A field that nothing declares is an error that names it; so are a value
that no run can have, values that contradict each other, and a value that the run would not read."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import ml_collections

from llada2_jax import mask_embedding, model_check, typed
from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.config import (
    ConfigError,
    MeshConfig,
    NoiseConfig,
    RuntimeConfig,
    ScheduleConfig,
    TrainConfig,
)
from llada2_jax.types import ModelConfig


def validate(config: ml_collections.ConfigDict) -> TrainConfig:
    """Frozen dataclasses from a ConfigDict.

    Raises: ConfigError for unknown fields, wrong types and values that cannot work together.
    """
    cfg = from_dict(TrainConfig, config.to_dict(), "config")
    _check(cfg)
    return cfg


def from_dict[T](cls: type[T], values: dict[str, Any], where: str) -> T:
    """A dataclass from {field: value}. where: what the dict is called in messages.

    Raises: ConfigError for unknown fields, missing ones and wrong types.
    """
    return typed.build(cls, values, where, ConfigError)


def configured_model(cfg: TrainConfig) -> ModelConfig:
    """The model of config.model, computed as config.runtime says.

    Raises: ConfigError that names what no such model can have.
    """
    elsewhere = {f"runtime.{name}": name for name in typed.names(RuntimeConfig)} | {"lora": "lora"}
    for group, name in elsewhere.items():
        _require(name not in cfg.model, f"config.model.{name} is not read: set config.{group}")
    model = from_dict(ModelConfig, cfg.model | dataclasses.asdict(cfg.runtime), "config.model")
    model_check.check_model(model, "config.model.", ConfigError)
    return model


CHOICES = {
    "noise.group": ("block", "sequence"),
    "noise.draw": ("count", "bernoulli"),
    "noise.weight": ("elbo", "flat"),
    "noise.later_turns": ("learn", "hide"),
    "data.block_anchor": ("document", "row"),
    "data.packing": ("concat", "best_fit"),
    "data.long_documents": ("error", "skip", "split"),
    "init.architecture": ("", *ARCHITECTURES),
    "init.mask_embedding": mask_embedding.CHOICES,
    "optimizer.moments": ("float32", "bfloat16", "int8"),
    "optimizer.rounding": ("stochastic", "nearest"),
    "spikes.non_finite": ("skip", "rollback", "stop"),
    "spikes.loss": ("ignore", "skip", "rollback", "stop"),
    "spikes.expert_overflow": ("ignore", "skip", "rollback", "stop"),
    "spikes.grad_norm": ("ignore", "skip", "rollback", "stop"),
    "reference.memory": ("device", "host"),
    **{f"runtime.{name}": choices for name, choices in model_check.CHOICES.items()},
    "runtime.dtype": ("bfloat16", "float32"),  # training in float16 would have to scale the loss
    "runtime.param_dtype": ("bfloat16", "float32"),
}
# What a number must be, in words, and the fields that it holds for.
_BOUNDS: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "must be positive",
        lambda x: x > 0,
        (
            "data.row_length",
            "data.rows_per_step",
            "data.pad_multiple",
            "noise.edit_weight",
            "cap.temperature",
            "optimizer.accumulate",
            "optimizer.learning_rate",
            "optimizer.eps",
            "optimizer.max_consecutive_skips",
            "dpo.beta",
            "dpo.samples",
            "eval.rows",
            "eval.samples",
            "runtime.expert_chunks",
            "checkpoint.keep_last",
            "checkpoint.preemption_seconds",
            "distributed.start_seconds",
            "distributed.heartbeat_seconds",
            "spikes.deviations",
            "spikes.window",
            "log_every",
        ),
    ),
    (
        "must not be negative",
        lambda x: x >= 0,
        (
            "runtime.expert_buffer",
            "optimizer.clip_norm",
            "optimizer.weight_decay",
            "optimizer.expert_bias_rate",
            "optimizer.router_z_loss",
            "schedule.ar_tokens",
            "schedule.warmup_tokens",
            "schedule.stable_tokens",
            "schedule.decay_tokens",
            "schedule.sft_tokens",
            "schedule.cap_tokens",
            "schedule.dpo_tokens",
            "schedule.total_tokens",
            "lora.rank",
            "cap.weight",
            "eval.every_tokens",
            "eval.rate_buckets",
            "eval.target_block_size",
            "embedding_noise.sigma",
            "embedding_noise.tokens",
            "checkpoint.every_tokens",
            "checkpoint.keep_best",
            "checkpoint.keep_every_tokens",
            "checkpoint.retry_seconds",
            "data.retry_seconds",
            "spikes.max_rollbacks",
        ),
    ),
    (
        "must be from 0 to 1",
        lambda x: 0 <= x <= 1,
        (
            "data.random_length_fraction",
            "noise.edit_rate",
            "noise.t_min",
            "noise.t_max",
            "optimizer.warmup_fraction",
            "optimizer.decay_fraction",
            "optimizer.final_fraction",
        ),
    ),
    ("must be at least 0 and below 1", lambda x: 0 <= x < 1, ("optimizer.b1", "optimizer.b2")),
    ("must be from 0 to 2**32 - 1", lambda x: 0 <= x < 2**32, ("seed",)),
)


@dataclasses.dataclass(frozen=True)
class _Unread:
    """Fields that nothing reads in some runs, and so stay at their defaults there. where: which
    runs, in words. holds: whether a run is one. instead: what else may be meant."""

    where: str
    holds: Callable[[TrainConfig], Any]
    fields: tuple[str, ...]
    instead: str = ""


def _all(group: str) -> tuple[str, ...]:
    return tuple(f"{group}.{field.name}" for field in dataclasses.fields(_get(TrainConfig, group)))


def _get(cfg: TrainConfig | type[TrainConfig], path: str) -> Any:
    value = cfg
    for name in path.split("."):
        value = getattr(value, name)
    return value


# The first that applies is reported: what a single field decides comes before the kind of the run.
_UNREAD = (
    _Unread(
        "where config.optimizer.decay_fraction=0: the rate does not come down",
        lambda cfg: not cfg.optimizer.decay_fraction,
        ("optimizer.final_fraction",),
    ),
    _Unread(
        "where config.model is set",
        lambda cfg: cfg.model,
        ("init.architecture", "init.mask_embedding", "init.mask_id"),
        "or set config.init.checkpoint in place of config.model",
    ),
    _Unread(
        "where config.init.checkpoint is set, which has its own",
        lambda cfg: cfg.init.checkpoint,
        ("data.tokenizer",),
    ),
    _Unread(
        "where config.data.sources is set",
        lambda cfg: cfg.data.sources,
        ("data.source",),
        "prepare it (llada2 data prepare), and add the folder to sources",
    ),
    _Unread(
        "where config.data.sources is empty: config.data.source is read once, at the start",
        lambda cfg: not cfg.data.sources,
        ("data.retry_seconds",),
    ),
    _Unread(
        "where config.data.sources has less than two folders",
        lambda cfg: len(cfg.data.sources) < 2,
        ("data.weights",),
    ),
    _Unread(
        "where config.data.sources is empty: its chats have turns",
        lambda cfg: not cfg.data.sources,
        ("noise.later_turns",),
    ),
    _Unread(
        "where config.data.packing='concat'",
        lambda cfg: cfg.data.packing == "concat",
        ("data.pad_multiple", "data.long_documents"),
        "or set packing='best_fit'",
    ),
    _Unread(
        "where config.data.packing='best_fit'",
        lambda cfg: cfg.data.packing == "best_fit",
        ("data.document_mask", "data.random_length_fraction"),
        "or set packing='concat'",
    ),
    _Unread(
        "where config.schedule.sft_tokens, cap_tokens and dpo_tokens are 0",
        lambda cfg: not _posttrains(cfg.schedule),
        ("schedule.posttrain_block",),
    ),
    _Unread(
        "where config.schedule.cap_tokens is 0",
        lambda cfg: not cfg.schedule.cap_tokens,
        _all("cap"),
    ),
    _Unread(
        "where config.schedule.dpo_tokens is 0",
        lambda cfg: not cfg.schedule.dpo_tokens,
        (*_all("dpo"), *_all("reference")),
    ),
    _Unread(
        "where config.reference.cache is set: then the reference does not stay at all",
        lambda cfg: cfg.reference.cache,
        ("reference.memory",),
    ),
    _Unread(
        "where config.reference.checkpoint is empty",
        lambda cfg: not cfg.reference.checkpoint,
        ("reference.mask_id",),
    ),
    _Unread("where config.lora.rank is 0", lambda cfg: not cfg.lora.rank, _all("lora")),
    _Unread(
        "where config.noise.draw='count', which covers (0, 1]",
        lambda cfg: cfg.noise.draw == "count",
        ("noise.t_min", "noise.t_max"),
        "or set draw='bernoulli'",
    ),
    _Unread(
        "where config.noise.edit_rate is 0",
        lambda cfg: not cfg.noise.edit_rate,
        ("noise.edit_weight",),
    ),
    _Unread(
        "where config.optimizer.learning_rate_from_start is set",
        lambda cfg: cfg.optimizer.learning_rate_from_start,
        ("optimizer.learning_rate",),
    ),
    _Unread(
        "where config.runtime.param_dtype='float32'",
        lambda cfg: cfg.runtime.param_dtype == "float32",
        ("optimizer.rounding",),
        "or set param_dtype='bfloat16'",
    ),
    _Unread(
        "in a run of one phase",
        lambda cfg: len(cfg.phases) == 1,
        ("optimizer.reset_each_phase",),
    ),
    _Unread(
        "where no policy of config.spikes is 'rollback'",
        lambda cfg: "rollback" not in dataclasses.astuple(cfg.spikes),
        ("spikes.max_rollbacks",),
    ),
    _Unread(
        "where config.distributed.enabled=False",
        lambda cfg: not cfg.distributed.enabled,
        ("distributed.start_seconds", "distributed.heartbeat_seconds"),
    ),
    _Unread(
        "where config.schedule.dpo_tokens is set: it adds no noise, and is validated on pairs",
        lambda cfg: cfg.schedule.dpo_tokens,
        (*_all("embedding_noise"), "eval.rate_buckets", "eval.target_block_size"),
    ),
    _Unread(
        "in an autoregressive run",
        lambda cfg: all(phase.objective == "ar" for phase in cfg.phases),
        (
            *_all("noise"),
            *_all("embedding_noise"),
            "data.block_anchor",
            "eval.samples",
            "eval.rate_buckets",
            "eval.target_block_size",
        ),
        "or set config.schedule.warmup_blocks, stable_tokens or decay_blocks",
    ),
)
# May be said where it is off anyway.
_OFF = {"eval.rate_buckets": 0, "optimizer.final_fraction": 1.0}


_FILES = (
    "workdir",
    "init.checkpoint",
    "reference.checkpoint",
    "reference.cache",
    "data.source",
    "data.tokenizer",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ConfigError(message)


def _check(cfg: TrainConfig) -> None:
    for path, choices in CHOICES.items():
        value = _get(cfg, path)
        _require(value in choices, f"config.{path}={value!r}: choose one of {choices}")
    for rule, good, fields in _BOUNDS:
        for path in fields:
            value = _get(cfg, path)
            _require(good(value), f"config.{path}={value!r} {rule}")
    files = [(path, _get(cfg, path)) for path in _FILES]
    for path, value in [*files, *(("data.sources", folder) for folder in cfg.data.sources)]:
        _require(
            "://" not in value,
            f"config.{path}: {value!r} is a URL, and runs need a file system: mount the bucket "
            "(docs/reliability.md), or copy",
        )
    _require(bool(cfg.workdir), "config.workdir is empty: say where the run's files go")
    _require(bool(cfg.phases), "config.schedule has no stage with tokens: nothing to train")
    _require(
        bool(cfg.init.checkpoint) != bool(cfg.model),
        "set exactly one of config.init.checkpoint (start from it) and config.model (from scratch)",
    )
    if cfg.model:
        configured_model(cfg)
    _require(
        not cfg.optimizer.learning_rate_from_start or bool(cfg.init.checkpoint),
        "config.optimizer.learning_rate_from_start: config.init.checkpoint is empty",
    )
    _check_dpo(cfg)
    _check_lora(cfg)
    warmup, decay = cfg.optimizer.warmup_fraction, cfg.optimizer.decay_fraction
    _require(
        warmup + decay <= 1,
        f"config.optimizer: warmup_fraction={warmup} and decay_fraction={decay} are more than the "
        "whole run: the learning rate would not come down to final_fraction",
    )
    _require(
        cfg.data.rows_per_step % cfg.optimizer.accumulate == 0,
        f"config.data.rows_per_step={cfg.data.rows_per_step} is not a multiple of "
        f"config.optimizer.accumulate={cfg.optimizer.accumulate}",
    )
    _check_data(cfg)
    _check_mesh(cfg.mesh)
    _check_noise(cfg.noise)
    noise, row, target = cfg.embedding_noise, cfg.data.row_length, cfg.eval.target_block_size
    _require(
        (noise.sigma > 0) == (noise.tokens > 0),
        f"config.embedding_noise: sigma={noise.sigma} and tokens={noise.tokens} belong together: "
        "set both, or neither",
    )
    _require(
        not target or row % target == 0,
        f"config.eval.target_block_size={target} must divide config.data.row_length={row}",
    )
    _check_blocks(cfg.schedule, row)
    for unread in _UNREAD:
        if unread.holds(cfg):
            _check_unread(cfg, unread)


def _check_unread(cfg: TrainConfig, unread: _Unread) -> None:
    for path in unread.fields:
        value, default = _get(cfg, path), _get(TrainConfig, path)
        _require(
            value in (default, _OFF.get(path, default)),
            f"config.{path}={value!r} is not read {unread.where}: leave it at {default!r}"
            + (f", {unread.instead}" if unread.instead else ""),
        )


def _check_blocks(schedule: ScheduleConfig, row: int) -> None:
    def divides(where: str, block: int) -> None:
        _require(
            1 <= block <= row and row % block == 0,
            f"config.schedule.{where}: {block} must divide config.data.row_length={row}",
        )

    for stage in ("warmup", "decay"):
        blocks, tokens = getattr(schedule, f"{stage}_blocks"), getattr(schedule, f"{stage}_tokens")
        where = f"config.schedule.{stage}"
        _require(not tokens or blocks, f"{where}_tokens={tokens}, but {where}_blocks is empty")
        _require(not blocks or tokens, f"{where}_blocks={blocks}, but {where}_tokens is 0")
        for block in blocks:
            divides(f"{stage}_blocks", block)
    if _posttrains(schedule):
        divides("posttrain_block", schedule.posttrain_block)


def _posttrains(schedule: ScheduleConfig) -> int:
    return schedule.sft_tokens or schedule.cap_tokens or schedule.dpo_tokens


def _check_noise(noise: NoiseConfig) -> None:
    _require(
        noise.t_min < noise.t_max,
        f"config.noise: need t_min < t_max, got {noise.t_min}, {noise.t_max}",
    )
    _require(
        not (noise.complementary and noise.draw == "bernoulli" and noise.weight == "elbo")
        or noise.t_max < 1,
        f"config.noise.t_max={noise.t_max}: the inverse of a complementary pair has rate 1 - t and "
        "weight 1/(1 - t), without bound here; lower it, or choose draw='count'",
    )


def _check_dpo(cfg: TrainConfig) -> None:
    if not cfg.schedule.dpo_tokens:
        return
    _require(
        len(cfg.phases) == 1,
        "config.schedule.dpo_tokens: its rows are preference pairs, which no other stage reads; "
        "train the others in a run before it",
    )
    _require(
        bool(cfg.init.checkpoint),
        "config.init.checkpoint is empty: dpo starts from a model that answers prompts",
    )
    _require(
        bool(cfg.data.sources) and cfg.data.packing == "best_fit",
        "config.schedule.dpo_tokens: name preference pairs in config.data.sources (llada2 data "
        "prepare --content preference), and set config.data.packing='best_fit'",
    )
    noise = cfg.noise
    all_rates = noise.draw == "count" or (noise.t_min, noise.t_max) == (0.0, 1.0)
    all_tokens = noise.later_turns == "learn" and not noise.edit_rate
    _require(
        all_rates and all_tokens and noise.weight == "elbo",
        "config.noise: dpo compares bounds on likelihoods (eq. 7): weight='elbo', edit_rate=0, "
        "later_turns='learn' and all rates (draw='count', or 'bernoulli' with t_min=0 and t_max=1)",
    )
    for name in ("dpo.samples", "eval.samples"):
        samples = _get(cfg, name)
        _require(
            samples % 2 == 0 or not cfg.dpo.antithetic,
            f"config.{name}={samples} must be even: config.dpo.antithetic takes draws in twos",
        )
    reference = cfg.reference
    _require(
        not (cfg.lora.rank and reference.memory == "host" and not reference.checkpoint),
        "config.reference.memory='host': the reference is the model under the adapters "
        "(config.lora.rank), which stays on the device",
    )


def _check_lora(cfg: TrainConfig) -> None:
    lora = cfg.lora
    if not lora.rank:
        return
    _require(lora.alpha > 0, f"config.lora.alpha={lora.alpha} must be positive")
    _require(
        bool(cfg.init.checkpoint) and cfg.init.mask_embedding == "keep",
        "config.lora.rank: adapters sit on a model as it is: name it in config.init.checkpoint "
        "and leave config.init.mask_embedding at 'keep'",
    )
    rate = cfg.optimizer.expert_bias_rate
    _require(
        not rate,
        f"config.optimizer.expert_bias_rate={rate}: it would change the weights under the adapters",
    )


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = dataclasses.asdict(mesh)
    for axis, size in sizes.items():
        _require(size > 0 or size == -1, f"config.mesh.{axis}={size} must be positive, or -1")
    rest = [axis for axis, size in sizes.items() if size == -1]
    _require(
        len(rest) <= 1,
        f"config.mesh: {' and '.join(rest)} are -1, which one axis may be: set the other",
    )


def _check_data(cfg: TrainConfig) -> None:
    data = cfg.data
    _require(
        len(data.weights) in (0, len(data.sources)) and all(w > 0 for w in data.weights),
        f"config.data.weights={data.weights}: one positive number for each of "
        f"config.data.sources={data.sources}, or ()",
    )
    if data.packing == "concat":
        return
    for block in {p.block_size for p in cfg.phases if p.objective not in ("ar", "mdlm")}:
        _require(
            data.pad_multiple % block == 0 and data.row_length % data.pad_multiple == 0,
            f"config.data.pad_multiple={data.pad_multiple} must be a multiple of each block size "
            f"({block}) and divide config.data.row_length={data.row_length}",
        )
