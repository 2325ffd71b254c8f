"""Grouped-query attention with per-head q/k norms before a partial rotary embedding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.model.layers import RMSNorm, normal, parameter, rotate
from llada2_jax.sharding import axis_size, constrain, cut, gathered, on_shards
from llada2_jax.types import ModelConfig
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention.decode import (
    ContiguousCache,
    PagedCache,
    decode_attention,
    decode_backend,
)
from pallas_kernels.block_layout import BlockLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after norm and rotation) and values of tokens, head-major as the decode kernels read
    them.

    k, v: [N, B, K, S, h] for a model of N layers, without the first axis inside a layer.
    """

    k: Array
    v: Array

    def until(self, lengths: Int[Array, " B"]) -> ContiguousCache:
        """The first `lengths` positions of every row, for a forward of all layers to attend to."""
        lengths = jnp.broadcast_to(lengths, (self.k.shape[0], *lengths.shape))
        return ContiguousCache(self.k, self.v, lengths)


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, heads, kv, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        dtype = cfg.param_dtype
        # q, k and v in one matrix, as released: heads, then keys, then values.
        self.qkv = parameter(
            rngs, (d, heads + 2 * kv, h), ("embed", "heads", None), normal(cfg), dtype
        )
        self.out = parameter(rngs, (heads, h, d), ("heads", None, "embed"), normal(cfg), dtype)
        self.q_norm = RMSNorm(h, cfg, rngs)
        self.k_norm = RMSNorm(h, cfg, rngs)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: tuple[Array, Array],
        layout: BlockLayout,
        cache: ContiguousCache | PagedCache | None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends to the cache (if any) and to the own positions; returns their keys and values."""
        q, k, v = self._project(x)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        if cache is None:
            out = self._attend_to_self(q, k, v, layout)
        else:
            backend = decode_backend(self.cfg.attention_backend)
            out = decode_attention(q, k, v, layout, cache, backend=backend)
        out = jnp.einsum("btnh,nhd->btd", out, gathered(self.out, x.dtype))
        return out, KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def _project(self, x: Float[Array, "B T D"]) -> list[Array]:
        """q, k and v, each [B, T, its heads, h]."""
        ends = [self.cfg.num_heads, self.cfg.num_heads + self.cfg.num_kv_heads]
        qkv = gathered(self.qkv, x.dtype)
        if axis_size("model") == 1:
            return jnp.split(jnp.einsum("btd,dnh->btnh", x, qkv), ends, axis=2)
        # Cut along the heads of all three at once, they are dealt out anew, each by its own heads:
        # the weights here, which are smaller than what they make.
        kernels = [constrain(w, None, "heads", None) for w in jnp.split(qkv, ends, axis=1)]
        return [jnp.einsum("btd,dnh->btnh", x, w) for w in kernels]

    def _attend_to_self(self, q, k, v, layout: BlockLayout) -> Float[Array, "B T H h"]:
        """Each device attends with its rows and heads: kernels are opaque to XLA's partitioner."""

        def attend(_, q, k, v, layout):
            parts = [(k, v, layout)]
            return block_attention(q, parts, layout, backend=self.cfg.attention_backend)

        heads = cut("batch", None, "heads")
        specs = [heads, heads, heads, cut("batch")]
        return on_shards(attend, (), q, k, v, layout, specs=specs, out_specs=heads, check_vma=False)
