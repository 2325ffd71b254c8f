"""Parameters, norms, rotary embedding and the dense feed-forward."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from llada2_jax.sharding import cut, cut_along, gathered, manual_index, on_shards, sum_over
from llada2_jax.types import LoRAConfig, ModelConfig, RopeScaling
from pallas_kernels.block_layout import HostOrDevice


class Buffer(nnx.Variable):
    """A stored array that no gradient reaches (the router's selection bias)."""


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    init: nnx.Initializer,
    dtype: str,
    kind: type[nnx.Variable] = nnx.Param,
) -> nnx.Variable:
    """The one declaration of a parameter: shape, logical axes (see sharding rules), initialiser."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {shape} has {len(axes)} logical axes: {axes}")
    return kind(init(rngs.params(), shape, jnp.dtype(dtype)), logical_axes=axes)


class Adapter(nnx.Param):
    """A low-rank factor, which is trained in place of the weight it is added to."""


class LowRank(nnx.Module):
    """x -> alpha / rank · (x a) b, beside a matrix of shape [*groups, *inputs, *outputs].

    a [*groups, *inputs, rank] is drawn with variance 1 / inputs, b [*groups, rank, *outputs] is 0:
    at first it adds nothing. Both are fp32 and cut over devices as the matrix is.
    """

    def __init__(
        self,
        rngs: nnx.Rngs,
        shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        lora: LoRAConfig,
        *,
        groups: int = 0,
        inputs: int = 1,
    ):
        first, last = slice(0, groups + inputs), slice(groups + inputs, None)
        init = nnx.initializers.normal(math.prod(shape[groups : groups + inputs]) ** -0.5)
        a_shape, b_shape = (*shape[first], lora.rank), (*shape[:groups], lora.rank, *shape[last])
        b_axes = (*axes[:groups], None, *axes[last])
        self.a = parameter(rngs, a_shape, (*axes[first], None), init, "float32", Adapter)
        self.b = parameter(rngs, b_shape, b_axes, nnx.initializers.zeros, "float32", Adapter)
        self.inputs, self.scale = inputs, lora.scale

    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        narrow = jnp.tensordot(x, gathered(self.a, x.dtype), self.inputs)
        return self.scale * jnp.tensordot(narrow, gathered(self.b, x.dtype), 1)


def adapter(
    module: str,
    cfg: ModelConfig,
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str | None, ...],
    *,
    groups: int = 0,
    inputs: int = 1,
) -> LowRank | None:
    """The adapter of a matrix that is declared with this shape and these axes, if its module has
    them. groups, inputs: how many axes are of either kind; the rest are outputs."""
    if cfg.lora is None or module not in cfg.lora.modules:
        return None
    return LowRank(rngs, shape, axes, cfg.lora, groups=groups, inputs=inputs)


def adapted(out: Float[Array, "..."], low_rank: LowRank | None, x: Float[Array, "..."]):
    """What a matrix made of x, and what its adapter, if there is one, adds."""
    return out if low_rank is None else out + low_rank(x)


def normal(cfg: ModelConfig) -> nnx.Initializer:
    """Ling's initialiser: a normal of cfg.initializer_range."""
    return nnx.initializers.normal(cfg.initializer_range)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale, in fp32, over the last axis."""

    def __init__(self, size: int, cfg: ModelConfig, rngs: nnx.Rngs):
        self.scale = parameter(rngs, (size,), ("norm",), nnx.initializers.ones, cfg.param_dtype)
        self.eps = cfg.rms_norm_eps

    def __call__(self, x: Float[Array, "... size"]) -> Float[Array, "... size"]:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + self.eps)
        return (y * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class FeedForward(nnx.Module):
    """SwiGLU. gate and up share one matrix [D, 2, F]. module: one of ADAPTED_MODULES."""

    def __init__(self, width: int, cfg: ModelConfig, rngs: nnx.Rngs, *, module: str):
        d, dtype = cfg.hidden_size, cfg.param_dtype
        up, down = ((d, 2, width), ("embed", None, "mlp")), ((width, d), ("mlp", "embed"))
        self.gate_up = parameter(rngs, *up, normal(cfg), dtype)
        self.down = parameter(rngs, *down, normal(cfg), dtype)
        self.gate_up_adapter = adapter(module, cfg, rngs, *up)
        self.down_adapter = adapter(module, cfg, rngs, *down)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        gate_up = jnp.einsum("...d,dcf->...cf", x, gathered(self.gate_up, x.dtype))
        gate_up = adapted(gate_up, self.gate_up_adapter, x)
        hidden = swiglu(gate_up[..., 0, :], gate_up[..., 1, :])
        return adapted(hidden @ gathered(self.down, x.dtype), self.down_adapter, hidden)


def embed(
    table: nnx.Variable, tokens: Int[HostOrDevice, "B T"], dtype: str
) -> Float[Array, "B T D"]:
    """Rows of a table [V, D]."""
    where = cut("batch", "length")
    ids = jnp.asarray(tokens)
    return on_shards(_embed_columns(dtype), table, ids, specs=[where], out_specs=where)


def _embed_columns(dtype: str):
    """Each device looks up the columns that it stores, for the tokens of all that store others, and
    then they swap: the table itself is never gathered."""

    def lookup(table: nnx.Variable, tokens: Array) -> Array:
        columns = table[...].astype(dtype)
        names = cut_along(table, "embed")
        if names:
            tokens = jax.lax.all_gather(tokens, names)
        first = manual_index("vocab") * columns.shape[0]
        x = jnp.take(columns, tokens - first, axis=0, mode="fill", fill_value=0)
        x = jnp.where((tokens >= first)[..., None], x, jnp.zeros((), x.dtype))
        if names:
            x = jax.lax.all_to_all(x, names, 0, x.ndim - 1, tiled=True)[0]
        return sum_over(x, "vocab")

    return lookup


def swiglu(gate: Float[Array, "... F"], up: Float[Array, "... F"]) -> Float[Array, "... F"]:
    """silu(gate) · up."""
    return jax.nn.silu(gate) * up


def rotary_frequencies(cfg: ModelConfig) -> tuple[np.ndarray, float]:
    """Inverse frequencies, fp32 [rotary_dim / 2], and the factor on cos and sin."""
    dim = cfg.rotary_dim
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    frequencies = (1.0 / np.float32(cfg.rope_theta) ** exponents).astype(np.float32)
    if cfg.rope_scaling is None:
        return frequencies, 1.0
    return _yarn(frequencies, dim, cfg.rope_theta, cfg.rope_scaling)


def _yarn(frequencies, dim, theta, scaling: RopeScaling):
    """YaRN: interpolate slow frequencies, keep fast ones, a linear ramp in between."""

    def dimension_of(rotations: float) -> float:
        context = scaling.original_max_position_embeddings
        return dim * math.log(context / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(dimension_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dimension_of(scaling.beta_slow)), dim - 1)
    high = high + 0.001 if high == low else high
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / (high - low), 0, 1)
    scaled = frequencies / scaling.factor * ramp + frequencies * (1 - ramp)
    factor = scaling.attention_factor
    if factor is None:
        factor = 0.1 * math.log(scaling.factor) + 1.0 if scaling.factor > 1 else 1.0
    return scaled.astype(np.float32), factor


def rotary_tables(
    cfg: ModelConfig, positions: Int[HostOrDevice, "B T"]
) -> tuple[Float[Array, "B T r"], Float[Array, "B T r"]]:
    """cos and sin in fp32, r = rotary_dim / 2."""
    frequencies, factor = rotary_frequencies(cfg)
    angles = positions[..., None].astype(jnp.float32) * frequencies
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def rotate(
    x: Float[Array, "B T heads h"], cos: Float[Array, "B T r"], sin: Float[Array, "B T r"]
) -> Float[Array, "B T heads h"]:
    """Rotate-half on the first 2r channels of each head; the others pass unchanged."""
    r = cos.shape[-1]
    cos, sin = cos[:, :, None], sin[:, :, None]
    y = x.astype(jnp.float32)
    first, second, rest = y[..., :r], y[..., r : 2 * r], y[..., 2 * r :]
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
