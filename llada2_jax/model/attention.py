"""Grouped-query attention with per-head q/k norms before a partial rotary embedding."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.model.layers import RMSNorm, adapted, adapter, normal, parameter, rotate
from llada2_jax.sharding import axis_size, constrain, cut, gathered, on_shards, own, sum_over, whole
from llada2_jax.types import ModelConfig
from pallas_kernels.block_attention import block_attention
from pallas_kernels.block_attention.decode import (
    ContiguousCache,
    PagedCache,
    decode_attention,
    decode_backend,
)
from pallas_kernels.block_layout import BlockLayout, zigzag


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


def _whole_row(k, v, layout: BlockLayout):
    """Keys and values of all devices along `context`, in the order of the row; the layout of this
    device's queries, and which tokens of the row they are."""
    ways = axis_size("context")
    order = zigzag(layout.spans, ways)
    at = jnp.asarray(order, jnp.int32)[jax.lax.axis_index("context")]
    k, v = (
        jax.lax.all_gather(x, "context", axis=1, tiled=True)[:, np.argsort(order.reshape(-1))]
        for x in (k, v)
    )
    spans = tuple((half, length // ways) for half, length in layout.spans)
    return k, v, BlockLayout(layout.block[:, at], layout.segment[:, at], spans), at


class Attention(nnx.Module):
    def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
        d, heads, kv, h = cfg.hidden_size, cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
        dtype = cfg.param_dtype
        # q, k and v in one matrix, as released: heads, then keys, then values.
        qkv = (d, heads + 2 * kv, h), ("embed", "heads", None)
        out = (heads, h, d), ("heads", None, "embed")
        self.qkv = parameter(rngs, *qkv, normal(cfg), dtype)
        self.out = parameter(rngs, *out, normal(cfg), dtype)
        self.qkv_adapter = adapter("attention", cfg, rngs, *qkv)
        self.out_adapter = adapter("attention", cfg, rngs, *out, inputs=2)
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
            heads = self._attend_to_self(q, k, v, layout)
        else:
            backend = decode_backend(self.cfg.attention_backend)
            heads = decode_attention(q, k, v, layout, cache, backend=backend)
        out = jnp.einsum("btnh,nhd->btd", heads, gathered(self.out, x.dtype))
        out = sum_over(adapted(out, self.out_adapter, heads), "heads")
        return out, KVCache(k.swapaxes(1, 2), v.swapaxes(1, 2))

    def _project(self, x: Float[Array, "B T D"]) -> list[Array]:
        """q, k and v, each [B, T, its heads, h]."""
        ends = [self.cfg.num_heads, self.cfg.num_heads + self.cfg.num_kv_heads]
        qkv = gathered(self.qkv, x.dtype)
        if axis_size("model") == 1:
            made = adapted(jnp.einsum("btd,dnh->btnh", x, qkv), self.qkv_adapter, x)
            return jnp.split(made, ends, axis=2)
        # Cut along the heads of all three at once, they are dealt out anew, each by its own heads:
        # the weights here, which are smaller than what they make.
        kernels = jnp.split(whole(qkv, "heads", 1), ends, axis=1)
        kernels = [constrain(own(w, "heads", 1), None, "heads", None) for w in kernels]
        made = [jnp.einsum("btd,dnh->btnh", x, w) for w in kernels]
        if self.qkv_adapter is None:
            return made
        added = jnp.split(whole(self.qkv_adapter(x), "heads", 2), ends, axis=2)
        return [out + own(more, "heads", 2) for out, more in zip(made, added, strict=True)]

    def _attend_to_self(self, q, k, v, layout: BlockLayout) -> Float[Array, "B T H h"]:
        """Each device attends with its rows, tokens and heads: kernels are opaque to XLA's
        partitioner."""
        backend = self.cfg.attention_backend

        def attend(_, q, k, v, layout):
            if axis_size("context") == 1:
                return block_attention(q, [(k, v, layout)], layout, backend=backend)
            k, v, queries, at = _whole_row(k, v, layout)
            return block_attention(q, [(k, v, layout)], queries, at=at, backend=backend)

        heads = cut("batch", "length", "heads")
        specs = [heads, heads, heads, cut("batch")]
        return on_shards(attend, (), q, k, v, layout, specs=specs, out_specs=heads, check_vma=False)
