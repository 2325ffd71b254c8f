"""What a training step costs, computed and not measured: FLOPs, bytes on links, a roofline.

A model FLOP is one that the mathematics asks for: matmuls of the chosen experts, allowed pairs of
attention, both halves, the head; no recomputation, no padding, no masked pairs. MFU is model FLOPs
over what the chips could do at their peak in the same time.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from llada2_jax.config import TrainConfig
from llada2_jax.hardware import Chip, Slice
from llada2_jax.sharding import AXES, RULES, Placement
from llada2_jax.types import ModelConfig

TRAINING = 3  # a backward pass is two forward passes of matmuls
BOTH_HALVES = ("bdlm", "cap", "dpo")  # objectives whose forward sees [noisy ; clean]


def allowed_pairs(length: int, block_size: int, objective: str) -> int:
    """Query-key pairs that the attention rule allows in one document of `length` tokens."""
    starts = np.arange(length, dtype=np.int64) // block_size * block_size
    ends = np.minimum(starts + block_size, length)
    if objective in BOTH_HALVES:
        return 2 * int(ends.sum())  # each half: earlier clean blocks and the own block
    if objective == "mdlm":
        return length * length  # one noisy block
    if objective != "ar":
        raise ValueError(f"objective {objective!r}")
    return int((np.arange(length, dtype=np.int64) + 1).sum())


def halves(objective: str) -> int:
    """Positions of a forward for each token of its rows."""
    return 2 if objective in BOTH_HALVES else 1


def copies(cfg: TrainConfig, objective: str) -> int:
    """Rows of a forward for each row of data: members of complementary pairs, draws of DPO."""
    members = 2 if cfg.noise.complementary and objective != "ar" else 1
    return members * (cfg.dpo.samples if objective == "dpo" else 1)


def forward_flops(
    cfg: ModelConfig, objective: str, row_length: int, block_size: int
) -> dict[str, float]:
    """FLOPs of the forward pass over one token of the rows, both halves, by part.

    objective: a name of OBJECTIVES. Rows are one document each; documents make attention cheaper.
    """
    pairs = allowed_pairs(row_length, block_size, objective) / row_length
    position = position_flops(cfg, pairs / halves(objective))
    # The clean half does not meet the head.
    return {n: (1 if n == "head" else halves(objective)) * f for n, f in position.items()}


def number_bytes(cfg: ModelConfig) -> int:
    """Of a number in the dtype of activations."""
    return 2 if cfg.dtype == "bfloat16" else 4


def position_flops(cfg: ModelConfig, keys: float) -> dict[str, float]:
    """FLOPs of the forward pass over one position that sees so many keys, by part."""
    d, h = cfg.hidden_size, cfg.head_dim
    expert = 3 * d * cfg.moe_intermediate_size
    projections = d * h * (2 * cfg.num_heads + 2 * cfg.num_kv_heads)
    multiply_adds = {
        "attention projections": cfg.num_layers * projections,
        "dense feed-forward": cfg.num_dense_layers * 3 * d * cfg.intermediate_size,
        "routed experts": cfg.num_moe_layers * cfg.experts_per_token * expert,
        "shared experts": cfg.num_moe_layers * cfg.num_shared_experts * expert,
        "router": cfg.num_moe_layers * d * cfg.num_experts,
        "attention pairs": cfg.num_layers * 2 * cfg.num_heads * h * keys,
        "head": d * cfg.vocab_size,
    }
    return {name: 2.0 * count for name, count in multiply_adds.items()}


@dataclasses.dataclass(frozen=True)
class Workload:
    """One step of a run on a mesh. objective, block_size: of the phase that is looked at."""

    cfg: TrainConfig
    model: ModelConfig
    sizes: Mapping[str, int]
    objective: str
    block_size: int

    @property
    def micro_batches(self) -> int:
        return self.cfg.optimizer.accumulate

    @property
    def rows(self) -> float:
        """Of the forward of one device and micro-batch, outside the pipeline."""
        ways = math.prod(self.sizes[axis] for axis in RULES["batch"])
        rows = self.cfg.data.rows_per_step * copies(self.cfg, self.objective)
        return rows / (self.micro_batches * ways)

    @property
    def positions(self) -> float:
        """Of one device and micro-batch."""
        ways = math.prod(self.sizes[axis] for axis in RULES["length"])
        return self.rows * self.cfg.data.row_length * halves(self.objective) / ways

    @property
    def ticks(self) -> float:
        """Of the pipeline, in each of which a device takes one row through its layers."""
        stages = self.sizes["stage"]
        return stages * self.rows + stages - 1

    @property
    def held(self) -> float:
        """MoE layers that a device computes, layers of zeros included, over all that there are."""
        layers = self.model.num_moe_layers
        return -(-layers // self.sizes["stage"]) / layers if layers else 1.0

    @property
    def stretch(self) -> float:
        """Work of a device in the MoE layers over what it is without stages, which is its share:
        the first and last ticks, and layers of zeros, are computed for nothing."""
        return self.held * self.ticks / self.rows

    @property
    def expert_rows(self) -> float:
        """(token, expert) pairs that a device has room for in a micro-batch, all parts together."""
        model, devices = self.model, self.sizes["expert"]
        pairs = self.positions * model.experts_per_token
        if devices == 1:
            return pairs
        worst = (
            self.positions * devices * min(model.experts_per_token, model.num_experts // devices)
        )
        return min(worst, model.expert_buffer * pairs) if model.expert_buffer else worst

    @property
    def recomputes(self) -> int:
        """1 where a layer's forward runs again in the backward pass."""
        return int(self.cfg.runtime.remat != "none")

    @property
    def forward(self) -> dict[str, float]:
        """FLOPs of one clean token's forward pass, by part."""
        parts = forward_flops(self.model, self.objective, self.cfg.data.row_length, self.block_size)
        return {name: copies(self.cfg, self.objective) * count for name, count in parts.items()}

    @property
    def refers(self) -> bool:
        """Whether each step has a forward pass of a reference besides."""
        return self.objective == "dpo" and not self.cfg.reference.cache

    @property
    def flops(self) -> dict[str, float]:
        """Model FLOPs of one clean token in training, forward and backward, by part. Weights under
        adapters have no gradient; attention has."""
        weights = TRAINING if self.model.lora is None else TRAINING - 1
        passes = dict.fromkeys(self.forward, weights) | {"attention pairs": TRAINING}
        parts = {name: passes[name] * count for name, count in self.forward.items()}
        return parts | ({"reference": sum(self.forward.values())} if self.refers else {})

    @property
    def flops_per_token(self) -> float:
        return sum(self.flops.values())

    @property
    def executed_flops_per_token(self) -> float:
        """With the layers' recomputation, and what stages compute for nothing; the head's gradient
        is made in its forward pass."""
        total = 0.0
        for name, forward in self.forward.items():
            again = int(self.refers) + (self.recomputes if name != "head" else 0)
            total += (self.flops[name] + again * forward) * (1 + self._waste(name))
        return total

    def _waste(self, part: str) -> float:
        """What stages compute of a part for nothing, over what they are asked for."""
        share = 1.0  # of the part that is within the pipeline
        if part in ("head", "dense feed-forward"):
            share = 0.0
        elif part.startswith("attention"):
            share = self.model.num_moe_layers / self.model.num_layers
        return share * (self.stretch - 1)


def link_bytes(
    work: Workload, params: Sequence[Placement], trained: Sequence[Placement] | None = None
) -> dict[str, float]:
    """Bytes that a device receives in one step, by mesh axis.

    Parameters are gathered for a layer's forward pass, and again for its backward pass where it is
    recomputed; gradients of the trained ones (None: all) are summed to where they are stored. All
    in the dtype of activations.
    """
    model, sizes = work.model, work.sizes
    width = number_bytes(model)
    received = dict.fromkeys(sizes, 0.0)
    learned = {place.name for place in (params if trained is None else trained)}
    for place in params:
        scatters = int(place.name in learned)
        passes = 1 + work.recomputes + scatters  # gather, gather again, scatter of the gradient
        part = math.prod(place.shape) * width
        part /= math.prod(sizes[name] for name in _cuts(place))
        axes, reduced = _gathered_axes(place), None
        if sizes["stage"] > 1 and _of_moe_layers(place):
            # Its layers are gathered once and kept; the backward pass is a row's.
            passes = work.held * (1 + (passes - 1) * work.ticks)
            reduced = float(place.bytes_per_device)
            if "stage" in axes:  # each stage gets its layers whole along it; gradients return
                moved = reduced * work.held * sizes["stage"]
                received["stage"] += (1 + scatters) * moved * (1 - 1 / sizes["stage"])
                part *= sizes["stage"]
                axes.remove("stage")
        for name in axes:
            received[name] += passes * part * (sizes[name] - 1)
            part *= sizes[name]
        # Of the gradient, all-reduced: before it is cut, or as a pipeline leaves it.
        reduced = part if reduced is None else reduced
        received["data"] += scatters * 2 * reduced * (1 - 1 / sizes["data"])
    rows = work.positions * model.hidden_size * width  # one activation
    moe_layers = model.num_moe_layers * work.stretch
    layers = model.num_dense_layers + moe_layers
    received["expert"] += moe_layers * rows * _exchanges(work)
    summed = 2 * rows * (1 - 1 / sizes["model"])
    received["model"] += layers * 2 * (2 + work.recomputes) * summed
    keys = 2 * work.positions * model.num_kv_heads * model.head_dim * width / sizes["model"]
    received["context"] += layers * (2 + work.recomputes) * keys * (sizes["context"] - 1)
    if sizes["stage"] > 1:  # rows of the other stages and what becomes of them, rows handed on
        handed = 2 * (sizes["stage"] - 1) + work.ticks / work.rows
        received["stage"] += 2 * rows * handed
    return {axis: work.micro_batches * value for axis, value in received.items()}


def _exchanges(work: Workload) -> float:
    """What a device receives along `expert` in a layer, forward and backward, in activations of its
    own tokens."""
    devices, model = work.sizes["expert"], work.model
    if model.exchange_over(devices) == "gather":  # and scatter, both ways; gather again
        return (4 + work.recomputes) * (devices - 1)
    # Pairs, there and back, both ways; once more as the weights' gradients need what came back.
    return (4 + 2 * work.recomputes) * model.experts_per_token * (1 - 1 / devices)


def _times_read(work: Workload, place: Placement) -> float:
    """How often a device reads a weight in a pass: a stage those of its layers, for each row."""
    staged = work.sizes["stage"] > 1 and _of_moe_layers(place)
    return work.held * work.ticks if staged else 1.0


def _of_moe_layers(place: Placement) -> bool:
    return "moe_layers/" in place.name


def _cuts(place: Placement) -> list[str]:
    """Mesh axes that cut a parameter."""
    return [name for entry in place.cuts for name in entry]


def _gathered_axes(place: Placement) -> list[str]:
    """Of these, those that it is gathered along where it is used (sharding.gathered)."""
    own = {"expert"} if "/experts/" in place.name else set()
    return [name for name in RULES["embed"] if name in _cuts(place) and name not in own]


def working_bytes(
    work: Workload, params: Sequence[Placement], trained: Sequence[Placement] | None = None
) -> dict[str, float]:
    """Bytes of a device during a step, besides the state: gradients of the trained parameters
    (None: all); the inputs of layers, which the backward pass starts from under full recomputation;
    the largest layer at work: its gathered weights with their gradients, and the experts' rows; and
    what a pipeline holds."""
    model, sizes = work.model, work.sizes
    width = number_bytes(model)
    several = work.micro_batches > 1  # summed in fp32, beside those of the micro-batch at hand
    learned = params if trained is None else trained
    stored = sum(place.bytes_per_device for place in learned)
    numbers = sum(
        math.prod(place.shape) / math.prod(sizes[n] for n in _cuts(place)) for place in learned
    )
    layers = [p for p in itertools.chain(params, learned) if _of_moe_layers(p)]
    at_work = sum(_whole_bytes(p, sizes, width) / p.shape[0] for p in layers)
    rows, met = work.expert_rows, work.positions
    sent = sizes["expert"] > 1 and model.exchange_over(sizes["expert"]) == "ragged"
    met *= model.experts_per_token if sent else sizes["expert"]
    expert_width = model.moe_intermediate_size / sizes["model"]
    # Rows and their gradients, in and between the two matmuls; the tokens met, and their fp32 sum.
    experts = rows * (2 * model.hidden_size + 4 * expert_width) * width
    experts += met * model.hidden_size * (width + 4)
    experts /= model.expert_chunks
    activation = work.positions * model.hidden_size * width
    inputs = model.num_dense_layers + model.num_moe_layers * work.stretch
    pipeline = {}
    if sizes["stage"] > 1:
        experts /= work.rows  # one row at a time
        # Of the stage: its layers, whole, its group's rows and what it made of them.
        whole = work.held * sum(_whole_bytes(p, sizes, width) for p in params if _of_moe_layers(p))
        made = activation * (sizes["stage"] + work.ticks / work.rows)
        pipeline = {"pipeline": whole + made}
    return {
        "gradients": stored + (4 * numbers if several else 0),
        "layer inputs": inputs * activation,
        "a layer at work": at_work + experts,
        **pipeline,
        # The head's fp32 gradient.
        "head": any(place.name.startswith("head") for place in learned)
        * (4.0 * model.hidden_size * model.vocab_size / sizes["model"]),
    }


def validation_bytes(work: Workload, params: Sequence[Placement]) -> float:
    """Bytes of a device during validation of as many rows as a micro-batch has, besides the state:
    a layer at work, whose experts have room for the worst case, its input and output, and a stage's
    layers. work: of validation (`validation_work`)."""
    activation = work.positions * work.model.hidden_size * number_bytes(work.model)
    parts = working_bytes(work, params, [])
    return parts["a layer at work"] + parts.get("pipeline", 0) + 2 * activation


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of one step under one limit each. tokens: clean tokens a step."""

    compute: float
    memory: float
    links: dict[str, float]
    tokens: int
    model_seconds: float

    @property
    def best(self) -> float:
        """Everything overlaps: the slowest of compute, memory and links."""
        return max(self.compute, self.memory, sum(self.links.values()))

    @property
    def in_turn(self) -> float:
        """Nothing overlaps."""
        return max(self.compute, self.memory) + sum(self.links.values())

    def mfu(self, seconds: float) -> float:
        return self.model_seconds / seconds


ASSUMPTIONS = (
    "matmuls and attention at the chip's peak, recomputed layers included; experts balanced",
    "memory: gathered weights read in each pass, state read and written once; activations not",
    "links: every byte that a device receives at the chip's full rate, one axis after the other; "
    "of GPUs all bytes of an axis that leaves a machine over the network, more than need be",
    "rows are one document each; an adapter's own matmuls are not counted",
    "a reference is as large as the policy; not counted are its traffic, and its room while it "
    "visits the devices from the host's memory",
)


def roofline(
    work: Workload,
    params: Sequence[Placement],
    state_bytes: float,
    slice_: Slice,
    trained: Sequence[Placement] | None = None,
) -> Roofline:
    """state_bytes: of parameters and optimizer state on a device. trained: as in link_bytes."""
    chip, tokens = slice_.chip, work.cfg.tokens_per_step
    peak = slice_.chips * chip.flops
    width = number_bytes(work.model)
    passes = (2 + work.recomputes) * work.micro_batches
    weights = sum(
        _times_read(work, place) * _whole_bytes(place, work.sizes, width) for place in params
    )
    traffic = passes * weights + 2 * state_bytes
    received = link_bytes(work, params, trained)
    return Roofline(
        compute=tokens * work.executed_flops_per_token / peak,
        memory=traffic / (chip.hbm_bandwidth / chip.devices),
        links={a: b / _link_rate(chip, work.sizes, a) for a, b in received.items() if b},
        tokens=tokens,
        model_seconds=tokens * work.flops_per_token / peak,
    )


def _link_rate(chip: Chip, sizes: Mapping[str, int], axis: str) -> float:
    """Bytes a second that a device receives along an axis; GPUs over the network where its devices
    are not of one machine. Neighbours along the last axes are neighbours there (sharding.AXES)."""
    span = math.prod(sizes[name] for name in AXES[AXES.index(axis) :])
    if chip.kind == "gpu" and span > chip.chips_per_host:
        return chip.network_bandwidth
    return chip.link_bandwidth / chip.devices


def _whole_bytes(place: Placement, sizes: Mapping[str, int], width: int) -> float:
    """Of a parameter on a device, once it is gathered."""
    kept = set(_cuts(place)) - set(_gathered_axes(place))
    return math.prod(place.shape) * width / math.prod(sizes[name] for name in kept)
