"""Layers in stages, one group of devices each, that rows pass through one after the other.

A stage computes its layers for row m while the next one has row m - 1. The rows of a group come
from all its stages, which outside the pipeline are devices like any others: each has its own rows
of the embedding, the dense layers and the head. So with one row a device there are as many
micro-batches as stages, and of S + M - 1 ticks a device idles through S - 1.

Layers need not divide among the stages: the last one is filled up with layers of zeros, which
leave what passes through them as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from llada2_jax.sharding import apart, axis_size, cut, on_shards
from llada2_jax.types import ExpertLoad
from pallas_kernels.block_layout import BlockLayout


def pipelined(
    layers: Callable[..., tuple[Array, ExpertLoad]],
    params: Any,
    count: int,
    x: Float[Array, "B T D"],
    rotary: tuple[Array, Array],
    layout: BlockLayout,
) -> tuple[Float[Array, "B T D"], ExpertLoad]:
    """x through `count` layers, as `layers(params, x, rotary, layout)` takes it without stages.

    params: of the layers, stacked; x, rotary and layout: cut as rows are.
    """

    def local(params, x, rotary, layout):
        with apart("stage"):
            mine = jax.tree.map(_own_layers, params, is_leaf=_is_variable)
            return _schedule(lambda *row: layers(mine, *row), count, x, rotary, layout)

    tokens = cut("batch", "length")
    return on_shards(
        local,
        params,
        *(x, rotary, layout),
        specs=[tokens, tokens, cut("batch")],
        out_specs=(tokens, cut()),
        check_vma=False,  # attention's kernels
    )


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def _own_layers(variable: nnx.Variable) -> nnx.Variable:
    """Of a parameter of all layers, cut along "embed" or whole, that of this stage's layers, cut
    as before but not along stages."""
    stages, axes = axis_size("stage"), variable.logical_axes

    def own(x: Array) -> Array:
        each = -(-x.shape[0] // stages)
        x = jnp.pad(x, [(0, stages * each - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
        if "embed" in axes:
            embed = 1 + axes.index("embed")
            return jax.lax.all_to_all(x, "stage", 0, embed, tiled=True)
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("stage") * each, each)

    return jax.tree.map(own, variable)


def _schedule(layers, count: int, x, rotary, layout) -> tuple[Array, ExpertLoad]:
    stages, stage = axis_size("stage"), jax.lax.axis_index("stage")
    x, rotary, layout = jax.tree.map(
        lambda rows: jax.lax.all_gather(rows, "stage", tiled=True), (x, rotary, layout)
    )
    number = x.shape[0]

    def tick(received, t):
        index = t - stage
        at = jnp.clip(index, 0, number - 1)
        row, *rest = jax.tree.map(
            lambda rows: jax.lax.dynamic_slice_in_dim(rows, at, 1), (x, rotary, layout)
        )
        out, load = layers(jnp.where(stage == 0, row, received), *rest)
        there = (index >= 0) & (index < number)
        load = jax.tree.map(lambda part: jnp.where(there, part, jnp.zeros_like(part)), load)
        onward = [(i, i + 1) for i in range(stages - 1)]
        return jax.lax.ppermute(out, "stage", onward), (out, load)

    _, (out, load) = jax.lax.scan(tick, jnp.zeros_like(x[:1]), jnp.arange(number + stages - 1))
    done = jnp.where(stage == stages - 1, out[stages - 1 :, 0], jnp.zeros((), out.dtype))
    done = jax.lax.psum_scatter(done, "stage", scatter_dimension=0, tiled=True)

    def of_all(part: Array) -> Array:
        part = part.sum(0).astype(part.dtype)
        each = part.shape[0]
        whole = jnp.zeros_like(part, shape=(stages * each, *part.shape[1:]))
        whole = jax.lax.dynamic_update_slice_in_dim(whole, part, stage * each, 0)
        return jax.lax.psum(whole, "stage")[:count]

    return done, jax.tree.map(of_all, load)
