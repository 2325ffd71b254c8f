"""Dropless expert dispatch: sort tokens by expert, grouped matmuls, weighted combine.

Every (token, choice) pair owns one slot of a buffer sorted by expert; with the tiled backend each
expert's stretch starts on a multiple of a tile. Slots and pairs are a bijection (up to padding),
so both directions of the permutation are gathers, forward and backward.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.model.layers import normal, parameter, swiglu
from llada2_jax.types import ModelConfig
from pallas_kernels.grouped_matmul import grouped_matmul, row_alignment


class Dispatch(NamedTuple):
    """pair_of_slot: [slots], index into the flat (token, choice) pairs; their count where unused.
    slot_of_pair: [tokens·k]. sizes: [E] slots an expert, padding included. load: [E] pairs."""

    pair_of_slot: Int[Array, " slots"]
    slot_of_pair: Int[Array, " pairs"]
    sizes: Int[Array, " E"]
    load: Int[Array, " E"]


def plan_dispatch(experts: Int[Array, "tokens k"], num_experts: int, alignment: int) -> Dispatch:
    """Sorts the pairs by expert (stable) and gives each a slot. Nothing is dropped."""
    flat = experts.reshape(-1)
    pairs = flat.shape[0]
    load = jnp.bincount(flat, length=num_experts)
    sizes = -(-load // alignment) * alignment
    order = jnp.argsort(flat, stable=True).astype(jnp.int32)
    sorted_experts = flat[order]
    rank = jnp.arange(pairs) - (jnp.cumsum(load) - load)[sorted_experts]
    slot = ((jnp.cumsum(sizes) - sizes)[sorted_experts] + rank).astype(jnp.int32)
    slots = -(-pairs // alignment) * alignment + (num_experts * alignment if alignment > 1 else 0)
    pair_of_slot = jnp.full((slots,), pairs, jnp.int32).at[slot].set(order, unique_indices=True)
    slot_of_pair = jnp.zeros((pairs,), jnp.int32).at[order].set(slot, unique_indices=True)
    return Dispatch(pair_of_slot, slot_of_pair, sizes, load)


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
    ) -> tuple[Float[Array, "tokens D"], Int[Array, " E"]]:
        """Weighted sum of the chosen experts' outputs, and the load of each expert."""
        cfg = self.cfg
        alignment = row_alignment(experts.size, cfg.num_experts, cfg.experts_backend)
        plan = plan_dispatch(experts, cfg.num_experts, alignment)

        def matmul(rows, kernel):
            w = kernel.reshape(kernel.shape[0], rows.shape[-1], -1).astype(rows.dtype)
            return grouped_matmul(
                rows, w, plan.sizes, alignment=alignment, backend=cfg.experts_backend
            )

        gate_up = matmul(_to_slots(x, plan), self.gate_up[...])
        hidden = swiglu(gate_up.reshape(gate_up.shape[0], 2, cfg.moe_intermediate_size))
        rows = _from_slots(matmul(hidden, self.down[...]), plan)
        rows = rows.reshape(*weights.shape, -1)
        out = jnp.einsum("tkd,tk->td", rows, weights.astype(rows.dtype))
        return out, plan.load
