"""Expert dispatch: sort tokens by expert, grouped matmuls, weighted combine.

Every (token, choice) pair owns one slot of a buffer sorted by expert; with the tiled backend each
expert's stretch starts on a multiple of a tile. Slots and pairs are a bijection (up to padding),
so both directions of the permutation are gathers, forward and backward.

Under a mesh each device along its axis `expert` has some of the experts, and tokens come to it in
one of two ways:

gather  It gathers the tokens of all devices along the axis and computes the pairs of its experts;
        what the devices add up to is scattered back. With 8 choices a token that moves no more
        than pairs would, for up to 8 devices.
ragged  Each pair is sent to its expert's device and back (`exchange`).

Either needs a buffer of a size known beforehand, cfg.expert_buffer times a balanced load. Pairs
beyond it are counted and left out; without a mesh, and with cfg.expert_buffer = 0, none ever are.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.model.exchange import exchange, expert_routes
from llada2_jax.model.layers import LowRank, adapter, normal, parameter, swiglu
from llada2_jax.sharding import axis_size, gathered
from llada2_jax.types import ModelConfig
from pallas_kernels.grouped_matmul import grouped_matmul, row_alignment

GATHER_UP_TO = 8
"""Devices along `expert` up to which expert_exchange="auto" is "gather"."""


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
    flat = jnp.where((flat >= 0) & (flat < count), flat, count)  # the others come last
    pairs = flat.shape[0]
    load = jnp.bincount(flat, length=count + 1)
    slots = -(-room // alignment) * alignment + (count * alignment if alignment > 1 else 0)
    ends = jnp.cumsum(-(-load[:count] // alignment) * alignment)
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends])
    starts = starts.at[count].set(jnp.maximum(starts[count], slots))
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_experts = flat[order]
    rank = jnp.arange(pairs) - (jnp.cumsum(load) - load)[sorted_experts]
    slot = (starts[sorted_experts] + rank).astype(jnp.int32)
    pair_of_slot = jnp.full((slots,), pairs, jnp.int32)
    pair_of_slot = pair_of_slot.at[slot].set(order, mode="drop", unique_indices=True)
    slot_of_pair = jnp.zeros((pairs,), jnp.int32).at[order].set(slot, unique_indices=True)
    ends = jnp.minimum(ends, slots)
    overflow = ((sorted_experts < count) & (slot >= slots)).sum(dtype=jnp.int32)
    return Dispatch(pair_of_slot, slot_of_pair, jnp.diff(ends, prepend=0), overflow)


@jax.custom_vjp
def _to_slots(x: Float[Array, "tokens D"], plan: Dispatch) -> Float[Array, "slots D"]:
    copies = plan.slot_of_pair.shape[0] // x.shape[0]
    return jnp.take(x, plan.pair_of_slot // copies, axis=0, mode="fill", fill_value=0)


def _to_slots_fwd(x, plan):
    return _to_slots(x, plan), (plan, x.shape[0])


def _to_slots_bwd(residual, g):
    plan, tokens = residual
    picked = jnp.take(g, plan.slot_of_pair, axis=0, mode="fill", fill_value=0)
    picked = picked.reshape(tokens, -1, g.shape[-1])
    return picked.astype(jnp.float32).sum(1).astype(g.dtype), None


_to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


@jax.custom_vjp
def _from_slots(y: Float[Array, "slots D"], plan: Dispatch) -> Float[Array, "pairs D"]:
    return jnp.take(y, plan.slot_of_pair, axis=0, mode="fill", fill_value=0)


def _from_slots_fwd(y, plan):
    return _from_slots(y, plan), plan


def _from_slots_bwd(plan, g):
    return jnp.take(g, plan.pair_of_slot, axis=0, mode="fill", fill_value=0), None


_from_slots.defvjp(_from_slots_fwd, _from_slots_bwd)


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
        devices = axis_size("expert")
        if devices == 1:
            return self._alone(x, experts, weights)
        ways = {"gather": self._gathering, "ragged": self._sending}
        auto = "gather" if devices <= GATHER_UP_TO else "ragged"
        way = self.cfg.expert_exchange
        return ways[auto if way == "auto" else way](x, experts, weights)

    def _alone(self, x, experts, weights):
        """All experts are here."""
        total = self.cfg.num_experts
        alignment = self._alignment(experts.size, total)
        plan = plan_dispatch(experts, 0, total, alignment, room=experts.size)
        rows = _from_slots(self._compute(_to_slots(x, plan), plan, alignment), plan)
        return _combine(rows, weights), plan.overflow

    def _gathering(self, x, experts, weights):
        """This device's experts, for the tokens of all."""
        count = self.cfg.num_experts // axis_size("expert")
        room = self._room(experts)
        alignment = self._alignment(room, count)
        x, experts, weights = (
            jax.lax.all_gather(part, "expert", tiled=True) for part in (x, experts, weights)
        )
        first = jax.lax.axis_index("expert") * count
        plan = plan_dispatch(experts, first, count, alignment, room)
        token = plan.pair_of_slot // experts.shape[1]  # past the last one where unused
        rows = jnp.take(x, token, axis=0, mode="fill", fill_value=0)
        rows = self._compute(rows, plan, alignment)
        weight = jnp.take(weights.reshape(-1), plan.pair_of_slot, mode="fill", fill_value=0)
        rows = rows * weight[:, None].astype(x.dtype)
        out = jnp.zeros_like(x).at[token].add(rows, mode="drop")
        out = jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)
        return out, plan.overflow

    def _sending(self, x, experts, weights):
        """Each pair to the device of its expert, and back."""
        total, room = self.cfg.num_experts, self._room(experts)
        count = total // axis_size("expert")
        alignment = self._alignment(room, count)
        pairs = plan_dispatch(experts, 0, total, alignment=1, room=experts.size)
        routes = expert_routes(pairs.sizes, room, "expert")
        rows = exchange(_to_slots(x, pairs), routes.there, routes.back, room, "expert")
        plan = plan_dispatch(routes.experts[:, None], 0, count, alignment, room)
        rows = _from_slots(self._compute(_to_slots(rows, plan), plan, alignment), plan)
        rows = exchange(rows, routes.back, routes.there, experts.size, "expert")
        return _combine(_from_slots(rows, pairs), weights), routes.overflow

    def _alignment(self, room: int, count: int) -> int:
        return row_alignment(room, count, self.cfg.experts_backend)

    def _room(self, experts: Int[Array, "tokens k"]) -> int:
        """Pairs that a device has room for: a multiple of a balanced load, or all that there could
        be."""
        devices, (tokens, k) = axis_size("expert"), experts.shape
        most = tokens * devices * min(k, self.cfg.num_experts // devices)
        factor = self.cfg.expert_buffer
        return min(most, math.ceil(factor * tokens * k)) if factor else most

    def _compute(self, rows, plan: Dispatch, alignment: int) -> Float[Array, "slots D"]:
        """Every slot through its expert."""

        def matmul(rows, kernel):
            w = kernel.reshape(kernel.shape[0], rows.shape[-1], -1)
            return grouped_matmul(
                rows, w, plan.sizes, alignment=alignment, backend=self.cfg.experts_backend
            )

        def project(rows, kernel, low_rank: LowRank | None):
            out = matmul(rows, gathered(kernel, rows.dtype))
            if low_rank is None:
                return out
            a, b = (gathered(factor, rows.dtype) for factor in (low_rank.a, low_rank.b))
            return out + low_rank.scale * matmul(matmul(rows, a), b)

        gate_up = project(rows, self.gate_up, self.gate_up_adapter)
        hidden = swiglu(gate_up.reshape(rows.shape[0], 2, -1))
        return project(hidden, self.down, self.down_adapter)


def _combine(
    rows: Float[Array, "pairs D"], weights: Float[Array, "tokens k"]
) -> Float[Array, "tokens D"]:
    rows = rows.reshape(*weights.shape, -1)
    return jnp.einsum("tkd,tk->td", rows, weights.astype(rows.dtype))
