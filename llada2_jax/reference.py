"""The frozen model that a policy is compared with."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float

from llada2_jax.model import merge_params
from llada2_jax.objectives import Context
from llada2_jax.objectives.dpo import bound_shares
from llada2_jax.types import Batch, ModelConfig, Params


def make_reference_step(
    model_cfg: ModelConfig, accumulate: int = 1
) -> Callable[[Params, Batch, Context], Float[Array, "B L"]]:
    """What Batch.reference holds, as a jitted function of the reference's parameters.

    A program of its own: nothing differentiates or donates the parameters, and parameters that
    rest in the host's memory are on the device only while it runs. Rows are taken in `accumulate`
    micro-batches, as the train step takes them.
    """

    def step(params: Params, batch: Batch, context: Context) -> Float[Array, "B L"]:
        model = merge_params(model_cfg, jax.device_put(params, jax.memory.Space.Device))
        micro = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        shares = jax.lax.map(lambda rows: bound_shares(model, rows, context), micro)
        return shares.reshape(batch.tokens.shape)

    return jax.jit(step)
