"""Configuration: dataclasses declare every field once; ConfigDicts are made from them.

A config file (configs/*.py) returns `default_config()` with changes; `config_check.validate` turns
it into these dataclasses.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections

from llada2_jax import typed
from llada2_jax.errors import UserError
from llada2_jax.types import LoRAConfig, ModelConfig


class ConfigError(UserError, ValueError):
    """A config that cannot be run; the message names the field and the way out."""


@dataclasses.dataclass(frozen=True)
class InitConfig:
    """checkpoint: a model checkpoint or Hugging Face folder to start from; empty: from scratch.
    mask_embedding: "keep" the row that becomes the mask token's, set it to the "mean" of all rows,
    or draw it at "random" (§7.1 compares noise with re-initialising).
    architecture: what the checkpoint must be, one of llada2_jax.architectures; `llada2 plan` then
    needs no checkpoint. Empty: anything."""

    checkpoint: str = ""
    architecture: str = ""
    mask_embedding: str = "keep"
    mask_id: int = -1


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """source: "stdlib" (the interpreter's own library) or a folder of Python files.
    sources: folders from `llada2 data prepare`; if there are any, they are the data, not `source`.
    weights: share of rows for each of sources; (): as many as each fills in an epoch.
    packing: "concat" cuts the stream of documents into rows; "best_fit" keeps documents whole, each
    rounded up to pad_multiple tokens (row_length: a row each). long_documents: what becomes of
    documents beyond a row under best_fit: an "error", or "skip" or "split" them.
    tokenizer: folder with tokenizer.json; empty: the starting checkpoint's.
    row_length: tokens a row. rows_per_step: rows a step, over all micro-batches.
    document_mask: documents of a row do not see each other. block_anchor: "document" or "row".
    random_length_fraction: share of rows cut in two at random (§4.2).
    retry_seconds: how long a read of `sources` that storage refuses is tried again."""

    source: str = "stdlib"
    sources: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    packing: str = "concat"
    pad_multiple: int = 32
    long_documents: str = "error"
    tokenizer: str = ""
    row_length: int = 256
    rows_per_step: int = 16
    document_mask: bool = True
    block_anchor: str = "document"
    random_length_fraction: float = 0.0
    retry_seconds: float = 60.0


@dataclasses.dataclass(frozen=True)
class NoiseConfig:
    """group: one rate a "block" or a "sequence". draw: "count" or "bernoulli".
    t_min, t_max: range of the mask rate, bernoulli only (post-training's bandwidth, §5.1; not
    published). low_discrepancy: rates spread evenly over the blocks of a document. weight: "elbo"
    (1/t) or "flat". complementary: each row twice, the second time with the inverse mask.
    later_turns: within a block, "learn" all assistant turns or "hide" what follows the first.
    edit_rate: share of the visible supervised tokens replaced by random ids, LLaDA2.1's
    token-to-token stream (rate not published; 0: off). edit_weight: of that stream's loss.
    See diffusion.py for what each combination estimates."""

    group: str = "block"
    draw: str = "count"
    t_min: float = 1e-3
    t_max: float = 1.0
    low_discrepancy: bool = True
    weight: str = "elbo"
    complementary: bool = False
    later_turns: str = "learn"
    edit_rate: float = 0.0
    edit_weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class CapConfig:
    """Confidence-aware parallel training (§5.2): the loss is that of SFT plus `weight` (λ) times
    the mean entropy of softmax(logits / temperature) over the supervised masked tokens, counted
    where the most probable id is the right one. Neither is published: dFactory recommends 2 at
    temperature 1, dParallel trains with 2 at 0.5."""

    weight: float = 2.0
    temperature: float = 1.0


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """beta: how strongly the policy is held to the reference (eq. 8). samples: Monte Carlo draws of
    the noise a text. antithetic: every second draw mirrors the one before it, so that their errors
    cancel in part; an even number of samples."""

    beta: float = 0.1
    samples: int = 1
    antithetic: bool = False


@dataclasses.dataclass(frozen=True)
class ReferenceConfig:
    """The model that "dpo" compares with. checkpoint: as init.checkpoint; empty: that one.
    mask_id: as in init. memory: where it stays between its forwards, on the "device" or the "host";
    under adapters (lora) the starting model is there anyway, and takes no memory of its own.
    cache: a file for its bounds, which are computed when the run first begins, and read after that:
    then no memory is needed; empty: computed beside each step."""

    checkpoint: str = ""
    mask_id: int = -1
    memory: str = "device"
    cache: str = ""


@dataclasses.dataclass(frozen=True)
class Phase:
    """A stretch of training under one objective. block_size: tokens a block (1 for "ar").
    tokens: clean tokens; a complementary pair counts once. See TrainConfig.phase_ends for steps."""

    name: str
    objective: str
    block_size: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class ScheduleConfig:
    """Warmup-Stable-Decay (§4.1) after an optional autoregressive stage, then post-training (§5).
    The paper prints the block sizes, not the tokens of each.

    ar_tokens: next-token prediction first. warmup_blocks: growing block sizes, which share
    warmup_tokens evenly; () is the direct switch of objective. stable_tokens: MDLM over whole
    documents, without the clean half. decay_blocks: shrinking block sizes, which share
    decay_tokens; one entry is the abrupt decay, several the stepwise one. sft_tokens: supervised
    fine-tuning (§5.1); cap_tokens: confidence-aware parallel training (§5.2); dpo_tokens:
    preference optimisation (§5.3), as a run of its own; all at posttrain_block tokens a block.
    total_tokens: if not 0, stages are scaled so that they sum to it, and arms of a comparison cost
    the same."""

    ar_tokens: int = 0
    warmup_blocks: tuple[int, ...] = ()
    warmup_tokens: int = 0
    stable_tokens: int = 0
    decay_blocks: tuple[int, ...] = ()
    decay_tokens: int = 0
    sft_tokens: int = 0
    cap_tokens: int = 0
    dpo_tokens: int = 0
    posttrain_block: int = 32
    total_tokens: int = 0

    def phases(self, row_length: int) -> tuple[Phase, ...]:
        """The run's phases in order; stages without tokens or blocks are absent."""
        phases = [
            *_stage("ar", (1,), self.ar_tokens, row_length),
            *_stage("warmup", self.warmup_blocks, self.warmup_tokens, row_length),
            *_stage("stable", (row_length,), self.stable_tokens, row_length),
            *_stage("decay", self.decay_blocks, self.decay_tokens, row_length),
            *_stage("sft", (self.posttrain_block,), self.sft_tokens, row_length),
            *_stage("cap", (self.posttrain_block,), self.cap_tokens, row_length),
            *_stage("dpo", (self.posttrain_block,), self.dpo_tokens, row_length),
        ]
        planned = [p.tokens for p in phases]
        tokens = _split(self.total_tokens or sum(planned), planned)
        return tuple(dataclasses.replace(p, tokens=n) for p, n in zip(phases, tokens, strict=True))


def _split(total: int, shares: Sequence[int]) -> list[int]:
    """`total` in proportion to `shares`: integers that sum to it exactly."""
    ends = [total * end // sum(shares) for end in itertools.accumulate(shares)]
    return [end - start for start, end in itertools.pairwise([0, *ends])]


_OBJECTIVE_OF = {"ar": "ar", "sft": "bdlm", "cap": "cap", "dpo": "dpo"}  # of one block size


def _stage(name: str, blocks: tuple[int, ...], tokens: int, row_length: int) -> list[Phase]:
    if not tokens or not blocks:
        return []
    if name in _OBJECTIVE_OF:
        return [Phase(name, _OBJECTIVE_OF[name], blocks[0], tokens)]
    objective = {True: "mdlm", False: "bdlm"}
    return [
        Phase(f"{name}-{block}", objective[block == row_length], block, each)
        for block, each in zip(blocks, _split(tokens, [1] * len(blocks)), strict=True)
    ]


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """AdamW with one warmup-stable-decay learning-rate schedule over the whole run.

    learning_rate_from_start: instead of learning_rate, the last one of the run that init.checkpoint
    is a step of, as DPO goes on where SFT ended (§5.3).

    warmup_fraction, decay_fraction: shares of all steps; the decay is linear to
    final_fraction · learning_rate. clip_norm: the gradient's largest norm (0: any). accumulate:
    micro-batches a step. reset_each_phase: forget the moments when a phase begins. offload: the
    optimizer's arrays rest in the host's memory between steps.
    expert_bias_rate: step of the auxiliary-loss-free load balancing
    (Ling's pretraining: 1e-3; not published for the conversion; 0: the bias stays).
    router_z_loss: weight of Σ logsumexp(router logits)² over positions and layers, divided as the
    loss is (Ling's pretraining: 3.5e-6; not published for the conversion; 0: off).
    moments: what Adam's moments are stored as; "int8" with a scale for each 128 neighbours.
    rounding: of updated bf16 parameters (runtime.param_dtype), "stochastic", or "nearest", which
    loses updates below half of what bf16 resolves (see optimizer.py).
    max_consecutive_skips: this many skipped steps in a row (see SpikeConfig) end the run."""

    learning_rate: float = 1e-3
    learning_rate_from_start: bool = False
    warmup_fraction: float = 0.02
    decay_fraction: float = 0.2
    final_fraction: float = 0.1
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    reset_each_phase: bool = False
    offload: bool = False
    expert_bias_rate: float = 0.0
    router_z_loss: float = 0.0
    moments: str = "float32"
    rounding: str = "stochastic"
    max_consecutive_skips: int = 5


@dataclasses.dataclass(frozen=True)
class EmbeddingNoiseConfig:
    """Gaussian noise on the mask's embedding output (§7.1): sigma at the first block-diffusion
    step, falling linearly to 0 after `tokens` clean tokens of block-diffusion training. Neither
    number is published. sigma 0: off."""

    sigma: float = 0.0
    tokens: int = 0


@dataclasses.dataclass(frozen=True)
class EvalConfig:
    """rows: validation rows, the same ones each time. every_tokens: how often (0: only where a
    phase ends). samples: Monte Carlo draws a row. rate_buckets: where a phase ends, the gradient's
    norm is reported for this many ranges of the mask rate (0: off; "ar" and "dpo" have none).
    target_block_size: checkpoints are compared on the bound at this block size, whatever the phase;
    0: the phase's own."""

    rows: int = 64
    every_tokens: int = 0
    samples: int = 1
    rate_buckets: int = 4
    target_block_size: int = 0


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """every_tokens: how often (0: at the end of phases). keep_last: newest kept.
    keep_best: best of each phase by validation kept, for merging. keep_every_tokens: the first
    checkpoint past each multiple is kept for good (0: none). retry_seconds: how long an operation
    that storage refuses is tried again before the run stops. preemption_seconds: how long a
    preempted run may take for its last checkpoint; less than the launcher's grace period."""

    every_tokens: int = 0
    keep_last: int = 2
    keep_best: int = 4
    keep_every_tokens: int = 0
    retry_seconds: float = 60.0
    preemption_seconds: float = 25.0


EVENTS = ("non_finite", "loss", "grad_norm", "expert_overflow")
"""What may befall a step: fields of SpikeConfig, in the order of `spikes.judge`'s events."""


@dataclasses.dataclass(frozen=True)
class SpikeConfig:
    """Steps that would do harm, and what to do: "ignore" (spikes only), "skip" the step's update,
    "rollback" to the checkpoint before it and skip all steps since, or "stop" the run. The update
    of a step that is not ignored is never applied.

    non_finite: the loss or the gradient's norm is not a number. loss, grad_norm: it lies more than
    `deviations` standard deviations above its moving average over about `window` steps of the same
    phase; judged once a phase is `window` steps old; metrics (`spike_loss`, `spike_grad_norm`) also
    tell of the ignored ones. expert_overflow: devices were chosen for more pairs of tokens and
    experts than runtime.expert_buffer has room for, and the step did without some; where that is
    ignored, the metric `expert_overflow` counts them. max_rollbacks: of a whole run."""

    non_finite: str = "skip"
    loss: str = "ignore"
    grad_norm: str = "ignore"
    expert_overflow: str = "stop"
    deviations: float = 6.0
    window: int = 128
    max_rollbacks: int = 10

    @property
    def of_step(self) -> SpikeConfig:
        """As the step takes it, which leaves out what it does not heed: see StepConfig."""
        heeded = {e: "ignore" if getattr(self, e) == "ignore" else "skip" for e in EVENTS}
        return dataclasses.replace(self, max_rollbacks=0, **heeded)


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
    """How to compute, not what: dtypes, kernels, recomputation. param_dtype: of the parameters that
    the optimizer updates; "float32" are master weights, cast to dtype where they are used, for
    "bfloat16" see optimizer.rounding. attention_backend: "auto" takes the fastest kernel that
    proves itself on the device at hand (docs/kernels.md). experts_backend: how sorted rows meet
    their experts' matrices; "auto" goes by the device (docs/parallelism.md). expert_buffer: room
    for pairs of tokens and experts on a device of mesh axis `expert`, in units of a balanced load
    (see spikes.expert_overflow); 0: the worst case, which nothing overflows. expert_exchange: how
    tokens reach the devices of their experts, "gather" or "ragged"; "auto" is "gather" on up to 8
    devices (docs/parallelism.md). expert_chunks: in how many parts, as far as it divides them, a
    device's tokens pass through the experts: more parts take less memory, and read the experts'
    weights more often."""

    dtype: str = "bfloat16"
    param_dtype: str = "float32"
    attention_backend: str = "auto"
    experts_backend: str = "auto"
    expert_buffer: float = 2.0
    expert_exchange: str = "auto"
    expert_chunks: int = 1
    remat: str = "none"


@dataclasses.dataclass(frozen=True)
class DistributedConfig:
    """Several processes: one on each host of a TPU slice, or on each GPU. enabled: look for them in
    the environment (see distributed.py). start_seconds: how long to wait until all are there.
    heartbeat_seconds: a process that is not heard of for so long is dead, and the job ends."""

    enabled: bool = True
    start_seconds: int = 300
    heartbeat_seconds: int = 30


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """Devices along each axis of the mesh (docs/parallelism.md); their product is the number of
    devices. -1, for one of them: what the others leave. data: rows, with parameters copied. fsdp:
    rows, with parameters cut. expert: experts, and rows outside them. context: positions of a row.
    model: heads, feed-forward width and vocabulary. stage: layers."""

    data: int = 1
    fsdp: int = -1
    expert: int = 1
    context: int = 1
    model: int = 1
    stage: int = 1


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """What a compiled training step takes from its run's config: runs that agree in it share one.
    total_steps: of the run, which the learning rate goes by. spikes: whether events are heeded
    ("skip") or not ("ignore"); what the host does about them is none of the step's business."""

    optimizer: OptimizerConfig
    spikes: SpikeConfig
    total_steps: int
    seed: int


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """One training run. seed: of everything random; below 2**32.
    model: architecture when init.checkpoint is empty; else it must be empty.
    workdir: where checkpoints, metrics and the config go; a run found there is resumed.
    log_every: steps between looks at the metrics. wandb_project: also log to this Weights & Biases
    project; empty: do not."""

    workdir: str = ""
    seed: int = 0
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    init: InitConfig = InitConfig()
    data: DataConfig = DataConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    noise: NoiseConfig = NoiseConfig()
    cap: CapConfig = CapConfig()
    dpo: DPOConfig = DPOConfig()
    reference: ReferenceConfig = ReferenceConfig()
    embedding_noise: EmbeddingNoiseConfig = EmbeddingNoiseConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    lora: LoRAConfig = LoRAConfig()
    eval: EvalConfig = EvalConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    spikes: SpikeConfig = SpikeConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    distributed: DistributedConfig = DistributedConfig()
    mesh: MeshConfig = MeshConfig()
    log_every: int = 10
    wandb_project: str = ""

    @functools.cached_property
    def phases(self) -> tuple[Phase, ...]:
        return self.schedule.phases(self.data.row_length)

    @property
    def tokens_per_step(self) -> int:
        return self.data.row_length * self.data.rows_per_step

    @functools.cached_property
    def phase_ends(self) -> tuple[int, ...]:
        """Steps of the run at each phase's end. The boundaries between phases are rounded up to
        steps, not each phase, so that runs of equal tokens take equal steps; a phase takes one at
        least."""
        ends = list(itertools.accumulate(phase.tokens for phase in self.phases))
        ends = [-(-end // self.tokens_per_step) for end in ends]
        for index, end in enumerate(ends):
            before = ends[index - 1] if index else 0
            after = len(ends) - 1 - index  # phases that need a step each
            ends[index] = max(before + 1, min(end, ends[-1] - after))
        return tuple(ends)

    @property
    def total_steps(self) -> int:
        return self.phase_ends[-1] if self.phase_ends else 0

    @property
    def of_step(self) -> StepConfig:
        return StepConfig(self.optimizer, self.spikes.of_step, self.total_steps, self.seed)

    def phase_at(self, step: int) -> tuple[int, Phase]:
        """Index and config of the phase that step `step` (from 0) belongs to; the last beyond."""
        index = min(bisect.bisect_right(self.phase_ends, step), len(self.phases) - 1)
        return index, self.phases[index]


def default_config() -> ml_collections.ConfigDict:
    """A locked ConfigDict with every field of TrainConfig at its default."""
    config = ml_collections.ConfigDict(dataclasses.asdict(TrainConfig()))
    return config.lock()


def model_dict(cfg: ModelConfig) -> dict[str, Any]:
    """The architecture fields of a ModelConfig, as `config.model` takes them."""
    values = dataclasses.asdict(cfg)
    return {k: v for k, v in values.items() if k not in typed.names(RuntimeConfig) | {"lora"}}


def load_config(
    path: str | Path, argument: str | None = None, **overrides: Any
) -> ml_collections.ConfigDict:
    """`get_config(argument)` of a config file, or `get_config()`; how one config builds on another
    one beside it. The command line writes --config=path:argument."""
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    if spec is None or spec.loader is None or not Path(path).is_file():
        raise ConfigError(
            f"{path} is not a config file: name one of configs/ in a clone of the repository, or "
            "your own"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config() if argument is None else module.get_config(argument)
    config.update(overrides)
    return config
