"""Expert dispatch: sort tokens by expert, grouped matmuls, weighted combine.

Every (token, choice) pair owns one slot of a buffer sorted by expert; with the tiled backend each
expert's stretch starts on a multiple of a tile. Slots and pairs are a bijection (up to padding),
so both directions of the permutation are gathers, each the other's gradient.

Under a mesh each device along its axis `expert` has some of the experts, and tokens come to it in
one of two ways:

gather  It gathers the tokens of all devices along the axis and computes the pairs of its experts;
        what the devices add up to is scattered back. With 8 choices a token that moves no more
        than pairs would, for up to 8 devices.
ragged  Each pair is sent to its expert's device and back (`exchange`).

Either needs a buffer of a size known beforehand, cfg.expert_buffer times a balanced load. Pairs
beyond it are counted and left out; without a mesh, and with cfg.expert_buffer = 0, none ever are.
With cfg.expert_chunks the tokens come in so many parts, one after the other, and only a part's rows
are in memory at a time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from llada2_jax.model.exchange import exchange, expert_routes
from llada2_jax.model.layers import LowRank, adapter, normal, parameter, swiglu
from llada2_jax.remat import DISPATCH
from llada2_jax.sharding import axis_size, gathered
from llada2_jax.types import ModelConfig
from pallas_kernels.grouped_matmul import chosen_backend, grouped_matmul, row_alignment

_BLOCK = 128
"""Pairs that one matmul of `_count_before` counts."""


class Dispatch(NamedTuple):
    """pair_of_slot: [slots], index into the flat (token, choice) pairs; their count where unused.
    slot_of_pair: [tokens·k]; the slots' count or more for pairs without one. sizes: [experts]
    slots an expert, padding included. overflow: int32, pairs that found no slot."""

    pair_of_slot: Int[Array, " slots"]
    slot_of_pair: Int[Array, " pairs"]
    sizes: Int[Array, " experts"]
    overflow: Int[Array, ""]


def plan_dispatch(
    experts: Int[Array, "tokens k"],
    first: int | Int[Array, ""],
    count: int,
    alignment: int,
    room: int,
) -> Dispatch:
    """Sorts the pairs of experts first .. first + count by expert (stable) and gives each a slot.

    room: pairs that are sure to find one, however they spread over the experts.
    """
    flat = experts.reshape(-1) - first
    here, index = (flat >= 0) & (flat < count), jnp.arange(flat.size, dtype=jnp.int32)
    slots = -(-room // alignment) * alignment + (count * alignment if alignment > 1 else 0)
    chosen = flat[:, None] == jnp.arange(count)
    before, load = _count_before(chosen)
    ends = jnp.cumsum(-(-load // alignment) * alignment)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    slot = jnp.where(chosen, starts + before, 0).sum(1, dtype=jnp.int32)
    slot = jnp.where(here, slot, slots + index)
    pair_of_slot = jnp.full((slots,), flat.size, jnp.int32)
    pair_of_slot = pair_of_slot.at[slot].set(index, mode="drop", unique_indices=True)
    overflow = (here & (slot >= slots)).sum(dtype=jnp.int32)
    ends = jnp.minimum(ends, slots)
    plan = Dispatch(pair_of_slot, slot, jnp.diff(ends, prepend=0), overflow)
    return checkpoint_name(plan, DISPATCH)


def _count_before(
    chosen: Bool[Array, "pairs experts"],
) -> tuple[Int[Array, "pairs experts"], Int[Array, " experts"]]:
    """How many earlier pairs chose each expert, and how many in all.

    A counting sort's cumulative sum, as one triangular matmul a block of pairs: the TPU compiles a
    sort, or a cumulative sum over all pairs, for ten seconds.
    """
    pairs, experts = chosen.shape
    blocks = jnp.pad(chosen, ((0, -pairs % _BLOCK), (0, 0))).reshape(-1, _BLOCK, experts)
    earlier = jnp.tril(jnp.ones((_BLOCK, _BLOCK), jnp.bfloat16), -1)
    within = jnp.einsum(
        "pq,bqe->bpe", earlier, blocks.astype(jnp.bfloat16), preferred_element_type=jnp.float32
    )
    sums = blocks.sum(1, dtype=jnp.int32)
    ends = jnp.cumsum(sums, axis=0)
    before = within.astype(jnp.int32) + (ends - sums)[:, None]
    return before.reshape(-1, experts)[:pairs], ends[-1]


def to_slots(x: Float[Array, "rows D"], plan: Dispatch) -> Float[Array, "slots D"]:
    """Each pair's row in its slot; anything in unused ones. x has a row a token, or a row a pair.

    Zeros there would cost the TPU a second array of this size; `_chosen` has weights of zero.
    """
    return _to_slots(x, plan, x.shape[0])


def from_slots(slots: Float[Array, "slots D"], plan: Dispatch, rows: int) -> Float[Array, "rows D"]:
    """Sums, in fp32, of the slots of each row's pairs: the transpose of `to_slots`."""
    return _from_slots(slots, plan, rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _to_slots(x, plan, rows):
    row = plan.pair_of_slot // (plan.slot_of_pair.size // rows)  # past the last where unused
    return jnp.take(x, row, axis=0, mode="clip")


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _from_slots(slots, plan, rows):
    slot = plan.slot_of_pair.reshape(rows, -1).T

    def choice(i):
        return jnp.take(slots, slot[i], axis=0, mode="fill", fill_value=0).astype(jnp.float32)

    # One choice at a time: at once they would be k times the tokens.
    out = jax.lax.fori_loop(1, slot.shape[0], lambda i, out: out + choice(i), choice(0))
    return out.astype(slots.dtype)


_to_slots.defvjp(
    lambda x, plan, rows: (_to_slots(x, plan, rows), plan),
    lambda rows, plan, g: (_from_slots(g, plan, rows), None),
)
_from_slots.defvjp(
    lambda slots, plan, rows: (_from_slots(slots, plan, rows), plan),
    lambda rows, plan, g: (_to_slots(g, plan, rows), None),
)


class Experts(nnx.Module):
    """E SwiGLU experts, stacked: gate_up [E, D, 2, F], down [E, F, D]."""

    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        e, d, f = cfg.num_experts, cfg.hidden_size, cfg.moe_intermediate_size
        dtype = cfg.param_dtype
        up = (e, d, 2, f), ("expert", "embed", None, "mlp")
        down = (e, f, d), ("expert", "mlp", "embed")
        self.gate_up = parameter(rngs, *up, normal(cfg), dtype)
        self.down = parameter(rngs, *down, normal(cfg), dtype)
        self.gate_up_adapter = adapter("experts", cfg, rngs, *up, groups=1)
        self.down_adapter = adapter("experts", cfg, rngs, *down, groups=1)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "tokens D"],
        experts: Int[Array, "tokens k"],
        weights: Float[Array, "tokens k"],
    ) -> tuple[Float[Array, "tokens D"], Int[Array, ""]]:
        """Weighted sum of the chosen experts' outputs, and the pairs that found no room."""
        kernels = self._kernels(x.dtype)

        def mixed(part):
            return self._way()(kernels, *part)

        chunks = math.gcd(self.cfg.expert_chunks, x.shape[0])
        if chunks == 1:
            return mixed((x, experts, weights))
        parts = (a.reshape(chunks, -1, a.shape[1]) for a in (x, experts, weights))
        out, overflow = jax.lax.map(jax.checkpoint(mixed, prevent_cse=False), tuple(parts))
        return out.reshape(x.shape), overflow.sum()

    def _kernels(self, dtype: Any) -> list[tuple[Array, tuple[Array, Array, float] | None]]:
        """What rows pass through, gathered: a matrix an expert, and its low-rank adapter."""

        def matrices(kernel, inputs):
            kernel = gathered(kernel, dtype)
            return kernel.reshape(kernel.shape[0], inputs, -1)

        def low_rank(adapter: LowRank | None, inputs):
            if adapter is None:
                return None
            a, b = matrices(adapter.a, inputs), matrices(adapter.b, adapter.a.shape[-1])
            return a, b, adapter.scale

        d, f = self.cfg.hidden_size, self.down.shape[-2]
        return [
            (matrices(self.gate_up, d), low_rank(self.gate_up_adapter, d)),
            (matrices(self.down, f), low_rank(self.down_adapter, f)),
        ]

    def _way(self) -> Callable:
        """How tokens reach their experts."""
        devices = axis_size("expert")
        if devices == 1:
            return self._alone
        ways = {"gather": self._gathering, "ragged": self._sending}
        return ways[self.cfg.exchange_over(devices)]

    def _alone(self, kernels, x, experts, weights):
        """All experts are here."""
        return self._chosen(kernels, x, experts, weights, 0, room=experts.size)

    def _gathering(self, kernels, x, experts, weights):
        """This device's experts, for the tokens of all."""
        room, count = self._room(experts), self.cfg.num_experts // axis_size("expert")
        gather = functools.partial(jax.lax.all_gather, axis_name="expert", tiled=True)
        x, experts, weights = map(gather, (x, experts, weights))
        first = jax.lax.axis_index("expert") * count
        out, overflow = self._chosen(kernels, x, experts, weights, first, room)
        return jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True), overflow

    def _sending(self, kernels, x, experts, weights):
        """Each pair to the device of its expert, and back."""
        room = self._room(experts)
        pairs = plan_dispatch(experts, 0, self.cfg.num_experts, alignment=1, room=experts.size)
        routes = expert_routes(pairs.sizes, room, "expert")
        rows = exchange(to_slots(x, pairs), routes.there, routes.back, room, "expert")
        # Weights stay here: rows of one number are what exchanges are slowest at.
        received = routes.experts[:, None]
        rows, _ = self._chosen(kernels, rows, received, jnp.ones(received.shape), 0, room)
        rows = exchange(rows, routes.back, routes.there, experts.size, "expert")
        weight = to_slots(weights.reshape(-1, 1), pairs)
        rows = (rows.astype(jnp.float32) * weight).astype(rows.dtype)
        return from_slots(rows, pairs, x.shape[0]), routes.overflow

    def _chosen(self, kernels, x, experts, weights, first, room):
        """What the experts from `first` on, those of `kernels`, add to each token.

        The weight is applied in the middle, where rows are narrow: the backward pass then needs no
        expert's output.
        """
        count, backend = len(kernels[0][0]), self._backend(kernels, x.dtype)
        alignment = row_alignment(room, count, backend)
        plan = plan_dispatch(experts, first, count, alignment, room)
        used = (plan.pair_of_slot < experts.size)[:, None]
        weight = jnp.where(used, to_slots(weights.reshape(-1, 1), plan), 0)

        def matmul(rows, w):
            return grouped_matmul(rows, w, plan.sizes, alignment=alignment, backend=backend)

        def project(rows, kernel, low_rank):
            out = matmul(rows, kernel)
            if low_rank is None:
                return out
            a, b, scale = low_rank
            return out + scale * matmul(matmul(rows, a), b)

        up, down = kernels
        gate_up = project(to_slots(x, plan), *up)
        hidden = swiglu(*jnp.split(gate_up, 2, axis=-1))
        hidden = (hidden.astype(jnp.float32) * weight).astype(x.dtype)
        return from_slots(project(hidden, *down), plan, x.shape[0]), plan.overflow

    def _backend(self, kernels, dtype) -> str:
        """One for both projections, whose rows are aligned alike. "auto" is "tiles" for all unless
        a kernel has proven itself for both, and beside adapters, which are too narrow for one."""
        asked = self.cfg.experts_backend
        chosen = {chosen_backend(asked, w.shape, dtype) for w, _ in kernels}
        adapted = any(low_rank is not None for _, low_rank in kernels)
        if asked == "auto" and "tokamax" in chosen and (adapted or len(chosen) > 1):
            return "tiles"
        (backend,) = chosen
        return backend

    def _room(self, experts: Int[Array, "tokens k"]) -> int:
        """Pairs that a device has room for: a multiple of a balanced load, or all that there could
        be."""
        devices, (tokens, k) = axis_size("expert"), experts.shape
        most = tokens * devices * min(k, self.cfg.num_experts // devices)
        factor = self.cfg.expert_buffer
        return min(most, math.ceil(factor * tokens * k)) if factor else most
