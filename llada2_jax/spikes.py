"""Steps that would do harm, found on the device: no step waits for the host to judge it."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llada2_jax.config import EVENTS, SpikeConfig


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SpikeWatch:
    """Moving averages of (loss, gradient norm) and of their squares over the steps applied in
    this phase. count: how many those are."""

    mean: Float[Array, "2"]
    square: Float[Array, "2"]
    count: Int[Array, ""]


def fresh_watch() -> SpikeWatch:
    """A watch that has seen nothing, as a phase begins with: another objective, another loss."""
    # Not one array twice: the state is donated.
    return SpikeWatch(jnp.zeros(2), jnp.zeros(2), jnp.zeros((), jnp.int32))


def judge(
    cfg: SpikeConfig,
    watch: SpikeWatch,
    loss: Float[Array, ""],
    grad_norm: Float[Array, ""],
    overflowed: Bool[Array, ""] | bool = False,
) -> tuple[SpikeWatch, Bool[Array, ""], Bool[Array, "4"]]:
    """(the watch after this step, whether to apply its update, which of EVENTS it was)."""
    values = jnp.stack([loss, grad_norm]).astype(jnp.float32)
    decay = jnp.float32(1 - 1 / cfg.window)
    weight = 1 - decay ** watch.count.astype(jnp.float32)  # of all steps so far: below 1 at first
    mean = watch.mean / jnp.maximum(weight, 1e-6)
    variance = watch.square / jnp.maximum(weight, 1e-6) - mean**2
    variance = jnp.maximum(variance, (1e-3 * mean) ** 2)  # a flat stretch is no reason to be picky
    limit = mean + cfg.deviations * jnp.sqrt(variance)
    finite = jnp.isfinite(values).all()
    spiked = finite & (watch.count >= cfg.window) & (values > limit)
    events = jnp.concatenate([~finite[None], spiked, jnp.asarray(overflowed)[None]])
    heeded = jnp.asarray([getattr(cfg, name) != "ignore" for name in EVENTS])
    applied = ~(events & heeded).any()
    seen = SpikeWatch(
        mean=decay * watch.mean + (1 - decay) * values,
        square=decay * watch.square + (1 - decay) * values**2,
        count=watch.count + 1,
    )
    watch = jax.tree.map(lambda new, old: jnp.where(applied, new, old), seen, watch)
    return watch, applied, events
