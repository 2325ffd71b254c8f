"""AdamW, as the config says it, with the precision in which parameters and moments are stored.

All arithmetic is fp32. What is stored in fewer bits (bf16 parameters, bf16 or 8-bit moments) is
rounded stochastically: up or down at random, so that the mean is exact. Between bf16 numbers near
0.02 lie 1.2e-4: rounding to nearest loses a step of lr 1e-5 each time, and a moving average stops
in the same way. The random numbers are a function of (seed, step, leaf, layer, index), so that a
resumed or re-sharded run draws the same ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt

from llada2_jax.config import OptimizerConfig, StepConfig
from llada2_jax.schedules import learning_rate
from llada2_jax.types import Params

BLOCK = 128
"""Neighbours along a parameter's last axis that share the scale of an 8-bit moment."""

_PURPOSE = 3  # of the random numbers; 0 to 2 are the noise's (diffusion.py)


def make_optimizer(cfg: StepConfig) -> optax.GradientTransformationExtraArgs:
    """AdamW under the run's learning-rate schedule; no decay on norm scales.

    `update` takes fp32 gradients and `key`, of its rounding; updates are fp32.
    """
    opt = cfg.optimizer
    return optax.chain(
        _adam(opt),
        optax.add_decayed_weights(opt.weight_decay, _decayed),
        optax.scale_by_learning_rate(learning_rate(opt, cfg.total_steps)),
    )


def take_step(
    cfg: StepConfig,
    params: Params,
    grads: Params,
    opt_state: optax.OptState,
    *,
    weight: Float[Array, ""],
    norm: Float[Array, ""],
    step: Int[Array, ""],
    applied: Bool[Array, ""],
) -> tuple[Params, optax.OptState]:
    """Parameters and optimizer state after a clipped step; as they were, where it is not applied.

    Layers that are stacked are updated one after the other, in place: all at once, what is computed
    in fp32 between gradient and parameter takes more memory than a layer at work.

    Args:
      grads: of any float dtype, times `weight`, which takes no second copy of them to undo here.
      norm: of all of them, without the weight.
      step: the run's; random numbers go by it. applied: whether to take it.
    """
    optimizer, clip = make_optimizer(cfg), cfg.optimizer.clip_norm
    factor = (jnp.where(norm < clip, 1.0, clip / norm) if clip else 1.0) / weight

    def update(state, grads, key):
        params, opt_state = state
        key_moments, key_params = jax.random.split(key)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) * factor, grads)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes dtypes
            updates, opt_state = optimizer.update(grads, opt_state, params, key=key_moments)
        new = apply_updates(cfg, params, updates, key_params), opt_state
        return jax.tree.map(lambda new, old: jnp.where(applied, new, old), new, state)

    parts = []
    for number, name in enumerate(sorted(params)):
        state, key = (params, opt_state), jax.random.fold_in(_rounding_key(cfg, step), number)
        parts.append(_in_layers(update, _part(state, name), _part(grads, name), key))
    empty = nnx.State({})  # so that one part alone is merged too: its inner states become dicts
    return jax.tree.map(
        lambda *nodes: nnx.merge_state(empty, *nodes) if _is_state(nodes[0]) else nodes[0],
        *parts,
        is_leaf=_is_state,
    )


def _rounding_key(cfg: StepConfig, step: Int[Array, ""]) -> Array:
    """The key of all rounding in one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(cfg.seed), _PURPOSE), step)


def _is_state(node: Any) -> bool:
    return isinstance(node, nnx.State)


def _part(tree: Any, name: str) -> Any:
    """Of everything that is shaped like the parameters, what belongs to `name`."""
    return jax.tree.map(
        lambda node: nnx.State({name: node[name]}) if _is_state(node) else node,
        tree,
        is_leaf=_is_state,
    )


def _in_layers(update: Callable, state: Any, grads: Params, key: Array) -> Any:
    """update(state, grads, key), layer by layer where parameters are stacked over layers."""
    layers = _layers(grads)
    if not layers:
        return update(state, grads, key)
    stacked = jax.tree.map(
        lambda node: jax.tree.map(lambda _: _is_state(node), node), state, is_leaf=_is_state
    )

    def body(i, new):
        def layer(x):
            return jax.lax.dynamic_index_in_dim(x, i, keepdims=False)

        old = jax.tree.map(lambda cut, x, whole: layer(x) if cut else whole, stacked, new, state)
        one = update(old, jax.tree.map(layer, grads), jax.random.fold_in(key, i))
        return jax.tree.map(
            lambda cut, x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0) if cut else y,
            stacked,
            new,
            one,
        )

    return jax.lax.fori_loop(0, layers, body, state)


def _layers(params: Params) -> int:
    """How many layers these parameters are stacked over; 0 if they are not."""
    variables = jax.tree.leaves(params, is_leaf=lambda node: isinstance(node, nnx.Variable))
    return next((len(v[...]) for v in variables if v[...].ndim > len(v.logical_axes)), 0)


def apply_updates(cfg: StepConfig, params: Params, updates: Params, key: Array) -> Params:
    """params + updates, summed in fp32 and stored in the parameters' dtype."""
    stochastic = cfg.optimizer.rounding == "stochastic"

    def apply(p, u, key):
        new = p.astype(jnp.float32) + u
        return stochastic_bfloat16(new, key) if _is_bf16(p) and stochastic else new.astype(p.dtype)

    return _map_with_keys(apply, key, params, updates)


def stochastic_bfloat16(x: Float[Array, "..."], key: Array) -> Float[Array, "..."]:
    """fp32 to one of the two bf16 neighbours, with probabilities that make the mean exact.

    What is not finite stays what it is.
    """
    noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


class Quantized(NamedTuple):
    """8-bit numbers and their scales. values: int8 or uint8, shaped like the parameters. scale:
    fp32, with one number for each BLOCK of the last axis (for all of it, if BLOCK divides it not).
    """

    values: Params
    scale: Params


def _adam(opt: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """optax's Adam in fp32 over moments stored as the config says.

    8-bit second moments are stored as their square roots, whose range is half as wide, and what is
    not zero is never rounded to zero: a first moment without its second would be a huge step.
    """
    adam = optax.scale_by_adam(opt.b1, opt.b2, opt.eps)

    def store(state: Any, key: Array) -> Any:
        key_mu, key_nu = jax.random.split(key)
        if opt.moments == "bfloat16":
            mu = _map_with_keys(stochastic_bfloat16, key_mu, state.mu)
            nu = _map_with_keys(stochastic_bfloat16, key_nu, state.nu)
        elif opt.moments == "int8":
            mu = _quantized(state.mu, key_mu, jnp.int8)
            nu = _quantized(jax.tree.map(jnp.sqrt, state.nu), key_nu, jnp.uint8)
        else:
            mu, nu = state.mu, state.nu
        return state._replace(mu=mu, nu=nu)

    def load(state: Any) -> Any:
        if opt.moments == "int8":
            mu, nu = _dequantized(state.mu), _dequantized(state.nu)
            return state._replace(mu=mu, nu=jax.tree.map(jnp.square, nu))
        return state._replace(mu=_float32(state.mu), nu=_float32(state.nu))

    def init(params):
        return store(adam.init(_float32(params)), jax.random.key(0))  # of zeros: nothing to round

    def update(updates, state, params=None, **extra):
        updates, new = adam.update(updates, load(state), params)
        return updates, store(new, extra["key"])

    return optax.GradientTransformationExtraArgs(init, update)


def _blocks(x: Array) -> Array:
    """[..., blocks, numbers of a block]"""
    size = x.shape[-1]
    return x.reshape(*x.shape[:-1], -1, BLOCK if size % BLOCK == 0 else size)


def _quantized(tree: Any, key: Array, dtype: Any) -> Quantized:
    largest = jnp.iinfo(dtype).max

    def scale(x):
        return jnp.abs(_blocks(x)).max(-1) / largest

    def round_(x, scale, key):
        steps = _blocks(x) / jnp.where(scale > 0, scale, 1.0)[..., None]
        rounded = jnp.floor(steps + _unit(jax.random.bits(key, steps.shape, jnp.uint32)))
        lowest = (steps > 0).astype(rounded.dtype) if dtype == jnp.uint8 else -largest
        return jnp.clip(rounded, lowest, largest).astype(dtype).reshape(x.shape)

    scales = jax.tree.map(scale, tree)
    return Quantized(_map_with_keys(round_, key, tree, scales), scales)


def _dequantized(moment: Quantized) -> Params:
    def number(values, scale):
        return (_blocks(values).astype(jnp.float32) * scale[..., None]).reshape(values.shape)

    return jax.tree.map(number, moment.values, moment.scale)


def _unit(bits: UInt[Array, "..."]) -> Float[Array, "..."]:
    """Uniform on [0, 1)."""
    return (bits >> 8).astype(jnp.float32) * 2.0**-24


def _map_with_keys(function, key: Array, tree: Any, *rest: Any) -> Any:
    """function(leaf, leaves of the other trees..., a key of the leaf's own) over a tree."""
    leaves, structure = jax.tree.flatten(tree)
    others = [jax.tree.leaves(other) for other in rest]
    new = [
        function(*of_one, jax.random.fold_in(key, i))
        for i, of_one in enumerate(zip(leaves, *others, strict=True))
    ]
    return jax.tree.unflatten(structure, new)


def _float32(tree: Any) -> Any:
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _is_bf16(x: Array) -> bool:
    return x.dtype == jnp.bfloat16


def _decayed(params):
    """True for matrices. Norm scales, also those stacked over layers, are called `scale`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "scale" not in jax.tree_util.keystr(path), params
    )
