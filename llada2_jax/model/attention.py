"""Grouped-query attention with per-head q/k norms before a partial rotary embedding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llada2_jax.model.layers import RMSNorm, normal, parameter, rotate
from llada2_jax.types import ModelConfig
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_layout import BlockLayout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys (after norm and rotation) and values of finished tokens.

    k, v: [N, B, S, K, h] for a model of N layers, without the first axis inside a layer.
    """

    k: Array
    v: Array


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, heads, kv, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        dtype = cfg.param_dtype
        # q, k and v in one matrix, as released: heads, then keys, then values.
        self.qkv = parameter(
            rngs, (d, heads + 2 * kv, h), ("embed", "heads", None), normal(cfg), dtype
        )
        self.out = parameter(rngs, (heads, h, d), ("heads", None, "embed"), normal(cfg), dtype)
        self.q_norm = RMSNorm(h, None, cfg, rngs)
        self.k_norm = RMSNorm(h, None, cfg, rngs)
        self.cfg = cfg

    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotary: tuple[Array, Array],
        layout: BlockLayout,
        cache: KVCache | None,
        cache_layout: BlockLayout | None,
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Attends to the cache (if any) and to the own positions; returns their keys and values."""
        heads, kv = self.cfg.num_heads, self.cfg.num_kv_heads
        qkv = jnp.einsum("btd,dnh->btnh", x, self.qkv[...].astype(x.dtype))
        q, k, v = jnp.split(qkv, [heads, heads + kv], axis=2)
        q, k = rotate(self.q_norm(q), *rotary), rotate(self.k_norm(k), *rotary)
        parts = [(k, v, layout)]
        if cache is not None and cache_layout is not None:
            parts.insert(0, (cache.k.astype(k.dtype), cache.v.astype(v.dtype), cache_layout))
        out = block_attention(q, parts, layout, backend=self.cfg.attention_backend)
        return jnp.einsum("btnh,nhd->btd", out, self.out[...].astype(x.dtype)), KVCache(k, v)
