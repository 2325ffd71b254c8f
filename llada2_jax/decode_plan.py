"""`llada2 plan --decode`: does a batch of requests fit a device, and how fast at best.

The sampler decodes a batch on one device, so a slice decodes as many batches at once as it has
devices. Its program is compiled by libtpu for such a device, which needs none; FLOPs, traffic and
time are computed.
"""

from __future__ import annotations

import dataclasses
import math
import time
from typing import Any

import jax
from jax.sharding import AbstractMesh
from rich.console import Console
from rich.table import Table

from llada2_jax.costs import number_bytes, position_flops
from llada2_jax.device_memory import Memory, compiled_bytes
from llada2_jax.errors import UsageError
from llada2_jax.hardware import Slice
from llada2_jax.model import build
from llada2_jax.sampler import SamplerOptions, abstract_generation, lower_generation
from llada2_jax.sharding import AXES, Placement, placements
from llada2_jax.types import ModelConfig
from pallas_kernels.aot import topology_devices

TOKENS_PER_FORWARD = (1, 2, 4, 8)
"""For which the speed is told: it is the model's and the text's, not the slice's."""

ASSUMPTIONS = (
    "matmuls at the chip's peak, or weights and keys read once a forward at its bandwidth, "
    "whichever takes longer",
    "every position chooses its experts at random: of few positions, some experts are not read",
    "all rows are of one length and in step; a forward sees the keys of a half-finished generation",
    "finished blocks are committed by forwards of their own",
)


@dataclasses.dataclass(frozen=True)
class Requests:
    """A batch: rows with prompts of `prompt` tokens, to which `new` ones are generated."""

    rows: int
    prompt: int
    new: int
    block_size: int = SamplerOptions.block_size

    @classmethod
    def parse(cls, text: str) -> Requests:
        """Of "ROWS,PROMPT,NEW" or "ROWS,PROMPT,NEW,BLOCK". Raises: UsageError."""
        try:
            values = [int(part) for part in text.split(",")]
            made = cls(*values)
        except (TypeError, ValueError):
            made = None
        if made is None or made.prompt < 0 or min(made.rows, made.new, made.block_size) < 1:
            raise UsageError(
                f"--decode={text}: write ROWS,PROMPT,NEW[,BLOCK], for example 8,4096,1024: rows of "
                "a batch, tokens of a prompt, tokens to generate, tokens of a block"
            )
        return made

    @property
    def options(self) -> SamplerOptions:
        return SamplerOptions(max_new_tokens=self.new, block_size=self.block_size)

    def forwards(self, tokens_per_forward: float) -> float:
        """Of a row: those that denoise, at least one a block, and those that commit a block, which
        the last one needs not."""
        last = (self.prompt + self.new - 1) // self.block_size
        blocks = last - self.prompt // self.block_size + 1
        return max(self.new / tokens_per_forward, blocks) + blocks - 1


@dataclasses.dataclass(frozen=True)
class Pass:
    """One forward pass of a batch. flops; traffic: bytes read from the device's memory."""

    flops: float
    traffic: float

    def seconds(self, slice_: Slice) -> float:
        chip = slice_.chip
        return chip.devices * max(self.flops / chip.flops, self.traffic / chip.hbm_bandwidth)


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """A batch on each device of a slice. prefill: of the prompts; forward: of a block of each
    row."""

    slice: Slice
    requests: Requests
    memory: Memory
    prefill: Pass
    forward: Pass

    def tokens_per_second(self, tokens_per_forward: float) -> float:
        """Of the whole slice, prompts not counted."""
        forwards = self.requests.forwards(tokens_per_forward)
        seconds = self.prefill.seconds(self.slice) + forwards * self.forward.seconds(self.slice)
        return self.slice.devices * self.requests.rows * self.requests.new / seconds

    @property
    def speeds(self) -> dict[int, float]:
        """Tokens a second by tokens a forward."""
        possible = [n for n in TOKENS_PER_FORWARD if n <= self.requests.block_size]
        return {n: self.tokens_per_second(n) for n in possible}

    def record(self) -> dict[str, Any]:
        """What --json prints; bytes are a device's, tokens per second the slice's."""
        passes = {"prefill": self.prefill, "forward": self.forward}
        return {
            "slice": self.slice.name,
            "chips": self.slice.chips,
            "devices": self.slice.devices,
            "requests_a_device": dataclasses.asdict(self.requests),
            **self.memory.record(),
            "flops": {name: each.flops for name, each in passes.items()},
            "traffic": {name: each.traffic for name, each in passes.items()},
            "seconds": {name: each.seconds(self.slice) for name, each in passes.items()},
            "tokens_per_second": self.speeds,
            "assumptions": list(ASSUMPTIONS),
        }


def plan_decoding(
    model: ModelConfig, requests: Requests, slice_: Slice, *, compiled: bool = True
) -> DecodePlan:
    """The plan of a batch on each device, with parameters in the dtype of activations.

    compiled: take temporaries from libtpu, where it compiles for the chip.
    Raises: RequestError for more tokens than the model has positions for; FileNotFoundError where
      libtpu is not; what the compiler raises, but for too little memory, which the plan then says.
    """
    model = dataclasses.replace(model, param_dtype=model.dtype, remat="none", lora=None)
    params = build(model)[1]
    mesh = AbstractMesh((1,) * len(AXES), tuple(AXES))
    carry = abstract_generation(model, requests.rows, requests.prompt, requests.options)[-1]
    places = placements(params, mesh)
    held = {
        "parameters": float(sum(place.bytes_per_device for place in places)),
        "keys and values": float(
            sum(
                math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(carry.cache)
            )
        ),
    }
    parts = _working_bytes(model, requests)
    memory = Memory(held, sum(parts.values()), parts, slice_.chip.usable_bytes)
    if compiled and slice_.chip.kind == "tpu":
        memory = _compiled(model, params, requests, slice_, memory)
    prompt, new = requests.prompt, requests.new
    return DecodePlan(
        slice_,
        requests,
        memory,
        prefill=_pass(model, places, requests.rows * prompt, 0, prompt / 2),
        forward=_pass(
            model,
            places,
            requests.rows * requests.block_size,
            requests.rows * (prompt + new / 2),
            prompt + new / 2,
            head=True,
        ),
    )


def _compiled(
    model: ModelConfig, params: Any, requests: Requests, slice_: Slice, memory: Memory
) -> Memory:
    device = topology_devices(slice_.libtpu_name)[0]
    start, options = time.perf_counter(), requests.options
    lowered = lower_generation(
        model.for_tpu, params, requests.rows, requests.prompt, options, device
    )
    needed = compiled_bytes(lowered)
    return memory.compiled_to(needed, sum(memory.state.values()), time.perf_counter() - start)


def _token_bytes(model: ModelConfig) -> float:
    """Of a token's keys and values."""
    return 2.0 * model.num_layers * model.num_kv_heads * model.head_dim * number_bytes(model)


def _working_bytes(model: ModelConfig, requests: Requests) -> dict[str, float]:
    """The keys and values of all layers that a prefill makes before it writes them; the experts'
    rows of one of its layers; and fp32 logits, with what a choice among them needs besides."""
    prompts = requests.rows * requests.prompt
    positions = max(prompts, requests.rows * requests.block_size)
    rows = positions * model.experts_per_token
    expert = 2 * model.hidden_size + 3 * model.moe_intermediate_size
    return {
        "keys and values of the prompts": prompts * _token_bytes(model),
        "a layer at work": float(rows * expert * number_bytes(model)),
        "logits": 2.0 * 4 * requests.rows * requests.block_size * model.vocab_size,
    }


def _pass(
    model: ModelConfig,
    places: list[Placement],
    positions: float,
    cached: float,
    keys: float,
    *,
    head: bool = False,
) -> Pass:
    """positions: of all rows. cached: tokens whose keys and values are read, of all rows. keys:
    that a position sees, in the mean. head: whether logits are asked for."""
    flops = position_flops(model, keys)
    if not head:
        del flops["head"]
    read = sum(place.bytes_per_device * _share(model, place, positions, head) for place in places)
    return Pass(positions * sum(flops.values()), read + cached * _token_bytes(model))


def _share(model: ModelConfig, place: Placement, positions: float, head: bool) -> float:
    """Of a parameter, how much is read."""
    if not positions:
        return 0.0
    if "/experts/" in place.name:
        return 1 - (1 - model.experts_per_token / model.num_experts) ** positions
    if place.name.startswith(("head", "embedding")):
        # A lookup reads next to nothing of the table.
        used = "embedding" if model.tie_word_embeddings else "head"
        return float(head and place.name.startswith(used))
    return 1.0


def print_decoding(plan: DecodePlan, console: Console) -> None:
    """The plan as tables for people."""
    requests, slice_, memory = plan.requests, plan.slice, plan.memory
    console.print(
        f"{slice_.name}, devices: {slice_.devices}; on each a batch of {requests.rows} prompts of "
        f"{requests.prompt} tokens, {requests.new} to generate in blocks of {requests.block_size}"
    )
    console.print(memory.table())
    if memory.compiled:
        console.print(f"compiled in {memory.seconds:.0f} s")
    table = Table(title="Roofline", title_justify="left")
    for column in ("pass", "GFLOP", "GB read", "milliseconds"):
        table.add_column(column, justify="left" if column == "pass" else "right")
    for name, each in (("prefill", plan.prefill), ("forward of a block", plan.forward)):
        milliseconds = f"{1e3 * each.seconds(slice_):.2f}"
        table.add_row(name, f"{each.flops / 1e9:,.0f}", f"{each.traffic / 1e9:.2f}", milliseconds)
    console.print(table)
    table = Table(title="Generated tokens per second, all devices", title_justify="left")
    for column in ("tokens per forward", "tokens/s"):
        table.add_column(column, justify="right")
    for rate, speed in plan.speeds.items():
        table.add_row(str(rate), f"{speed:,.0f}")
    console.print(table)
    console.print("Bounds, not measurements. Assumed: " + "; ".join(ASSUMPTIONS) + ".", style="dim")
