"""Dropless expert dispatch: sort tokens by expert, grouped matmuls, weighted combine.

Every (token, choice) pair owns one slot of a buffer sorted by expert; with the tiled backend each
expert's stretch starts on a multiple of a tile. Slots and pairs are a bijection (up to padding),
so both directions of the permutation are gathers, forward and backward.

Under a mesh whose axis `expert` is larger than 1, each device along it has some of the experts. It
gathers the tokens of all, computes the pairs of its experts, and what the devices add up to is
scattered back: with 8 choices a token that moves no more than sending each pair would, for up to 8
devices.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.model.layers import normal, parameter, swiglu
from llada2_jax.sharding import axis_size, gathered
from llada2_jax.types import ModelConfig
from pallas_kernels.grouped_matmul import grouped_matmul, row_alignment


class Dispatch(NamedTuple):
    """pair_of_slot: [slots], index into the flat (token, choice) pairs; their count where unused.
    slot_of_pair: [tokens·k]; the slots' count or more for pairs of other experts. sizes: [experts]
    slots an expert, padding included."""

    pair_of_slot: Int[Array, " slots"]
    slot_of_pair: Int[Array, " pairs"]
    sizes: Int[Array, " experts"]


def plan_dispatch(
    experts: Int[Array, "tokens k"], first: int | Int[Array, ""], count: int, alignment: int
) -> Dispatch:
    """Sorts the pairs of experts first .. first + count by expert (stable) and gives each a slot.
    Nothing is dropped: there are slots for the most pairs that there could be."""
    tokens, k = experts.shape
    pairs, most = tokens * k, tokens * min(k, count)
    flat = experts.reshape(-1) - first
    flat = jnp.where((flat >= 0) & (flat < count), flat, count)  # the others come last
    load = jnp.bincount(flat, length=count + 1)
    sizes = -(-load // alignment) * alignment
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_experts = flat[order]
    rank = jnp.arange(pairs) - (jnp.cumsum(load) - load)[sorted_experts]
    slots = -(-most // alignment) * alignment + (count * alignment if alignment > 1 else 0)
    start = jnp.where(jnp.arange(count + 1) < count, jnp.cumsum(sizes) - sizes, slots)
    slot = (start[sorted_experts] + rank).astype(jnp.int32)
    pair_of_slot = jnp.full((slots,), pairs, jnp.int32)
    pair_of_slot = pair_of_slot.at[slot].set(order, mode="drop", unique_indices=True)
    slot_of_pair = jnp.zeros((pairs,), jnp.int32).at[order].set(slot, unique_indices=True)
    return Dispatch(pair_of_slot, slot_of_pair, sizes[:count])


@jax.custom_vjp
def _to_slots(x: Float[Array, "tokens D"], plan: Dispatch) -> Float[Array, "slots D"]:
    copies = plan.slot_of_pair.shape[0] // x.shape[0]
    return jnp.take(x, plan.pair_of_slot // copies, axis=0, mode="fill", fill_value=0)


def _to_slots_fwd(x, plan):
    return _to_slots(x, plan), (plan, x.shape[0])


def _to_slots_bwd(residual, g):
    plan, tokens = residual
    picked = g[plan.slot_of_pair].reshape(tokens, -1, g.shape[-1])
    return picked.astype(jnp.float32).sum(1).astype(g.dtype), None


_to_slots.defvjp(_to_slots_fwd, _to_slots_bwd)


@jax.custom_vjp
def _from_slots(y: Float[Array, "slots D"], plan: Dispatch) -> Float[Array, "pairs D"]:
    return y[plan.slot_of_pair]


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
        self.gate_up = parameter(
            rngs, (e, d, 2, f), ("expert", "embed", None, "mlp"), normal(cfg), dtype
        )
        self.down = parameter(rngs, (e, f, d), ("expert", "mlp", "embed"), normal(cfg), dtype)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "tokens D"],
        experts: Int[Array, "tokens k"],
        weights: Float[Array, "tokens k"],
    ) -> Float[Array, "tokens D"]:
        """Weighted sum of the chosen experts' outputs."""
        if axis_size("expert") > 1:
            return self._with_others(x, experts, weights)
        alignment = self._alignment(experts)
        plan = plan_dispatch(experts, 0, self.cfg.num_experts, alignment)
        rows = _from_slots(self._compute(_to_slots(x, plan), plan, alignment), plan)
        rows = rows.reshape(*weights.shape, -1)
        return jnp.einsum("tkd,tk->td", rows, weights.astype(rows.dtype))

    def _with_others(self, x, experts, weights):
        """Each device computes its experts' share for the tokens of all."""
        count = self.cfg.num_experts // axis_size("expert")
        alignment = self._alignment(experts)
        x, experts, weights = (
            jax.lax.all_gather(part, "expert", tiled=True) for part in (x, experts, weights)
        )
        plan = plan_dispatch(experts, jax.lax.axis_index("expert") * count, count, alignment)
        token = plan.pair_of_slot // experts.shape[1]  # past the last one where unused
        rows = jnp.take(x, token, axis=0, mode="fill", fill_value=0)
        rows = self._compute(rows, plan, alignment)
        weight = jnp.take(weights.reshape(-1), plan.pair_of_slot, mode="fill", fill_value=0)
        out = jnp.zeros_like(x).at[token].add(rows * weight[:, None].astype(x.dtype), mode="drop")
        return jax.lax.psum_scatter(out, "expert", scatter_dimension=0, tiled=True)

    def _alignment(self, experts) -> int:
        return row_alignment(experts.size, self.cfg.num_experts, self.cfg.experts_backend)

    def _compute(self, rows, plan: Dispatch, alignment: int) -> Float[Array, "slots D"]:
        """Every slot through its expert."""

        def matmul(rows, kernel):
            w = kernel.reshape(kernel.shape[0], rows.shape[-1], -1)
            return grouped_matmul(
                rows, w, plan.sizes, alignment=alignment, backend=self.cfg.experts_backend
            )

        gate_up = matmul(rows, gathered(self.gate_up, rows.dtype))
        hidden = swiglu(gate_up.reshape(rows.shape[0], 2, -1))
        return matmul(hidden, gathered(self.down, rows.dtype))
