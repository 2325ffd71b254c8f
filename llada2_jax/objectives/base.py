"""What an objective gets and gives."""

from __future__ import annotations

import dataclasses
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from llada2_jax.config import CapConfig, DPOConfig, NoiseConfig
from llada2_jax.model import Transformer
from llada2_jax.sharding import cut, gathered, manual_axis, on_shards, sum_over
from llada2_jax.types import Batch, ExpertLoad, WeightedSum
from pallas_kernels.block_layout import HostOrDevice, Scalar
from pallas_kernels.vocab_loss import TokenStats, token_losses, vocab_loss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What a step knows besides the rows.

    block_size: int32 scalar, data, so that phases share one compilation. sigma: fp32 scalar, scale
    of the masked-embedding noise. rates: fp32 [2], only tokens whose group's mask rate lies in
    (rates[0], rates[1]] count (a diagnostic; the full range by default). draw: int32 scalar, the
    number of the Monte Carlo draw, data likewise. supervised_per_masked: fp32 scalar, over the
    whole batch the loss weight of supervised tokens per that of masked ones, which a micro-batch
    cannot know (`objectives.whole_batch_context`). Static: the noise, the seed, the mask's id, the
    anchor of blocks, and what only one objective reads.
    """

    block_size: Int[Scalar, ""]
    sigma: Float[Scalar, ""]
    rates: Float[HostOrDevice, " 2"]
    noise: NoiseConfig = dataclasses.field(metadata={"static": True})
    seed: int = dataclasses.field(metadata={"static": True})
    mask_id: int = dataclasses.field(metadata={"static": True})
    block_anchor: str = dataclasses.field(metadata={"static": True})
    draw: Int[Scalar, ""] = np.int32(0)
    supervised_per_masked: Float[Scalar, ""] = np.float32(1)
    cap: CapConfig = dataclasses.field(default=CapConfig(), metadata={"static": True})
    dpo: DPOConfig = dataclasses.field(default=DPOConfig(), metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LossOutput:
    """loss: what is minimised, as a sum and its denominator (loss weights of the supervised tokens
    before masking). nll: fp32 [B, L], each token's share of the loss before division. metrics:
    further means. expert_load: the model's."""

    loss: WeightedSum
    nll: Float[Array, "B L"]
    metrics: dict[str, WeightedSum]
    expert_load: ExpertLoad


class Objective(Protocol):
    def __call__(self, model: Transformer, batch: Batch, context: Context) -> LossOutput: ...


def loss_weights(batch: Batch) -> Float[Array, "B L"]:
    """What each token's loss weighs: fp32, 0 for what is not supervised."""
    supervised = jnp.asarray(batch.loss_mask & (batch.segment_ids > 0))
    if batch.loss_weights is None:
        return supervised.astype(jnp.float32)
    return jnp.where(supervised, batch.loss_weights, 0.0)


def weighted_nll(
    model: Transformer,
    hidden: Float[Array, "B L D"],
    targets: Int[HostOrDevice, "B L"],
    weights: Float[Array, "B L"],
    *,
    entropy_weights: Float[Array, "B L"] | None = None,
    temperature: float = 1.0,
) -> tuple[Float[Array, ""], TokenStats]:
    """Σ weights · −log p(target) under the model's head, and the statistics of the tokens whose
    weight is not 0. Logits of all tokens never exist. entropy_weights, temperature: see
    `vocab_loss`."""

    def loss(hidden, head, targets, weights, entropy_weights, **options):
        total, stats = vocab_loss(
            *(hidden, head, targets, weights),
            entropy_weights=entropy_weights,
            temperature=temperature,
            **options,
        )
        return sum_over(total, "batch", "length"), stats

    per_token = targets, weights, entropy_weights
    return _with_head(loss, model, hidden, *per_token, out_specs=(cut(), _TOKENS))


def token_nll(
    model: Transformer,
    hidden: Float[Array, "B L D"],
    targets: Int[HostOrDevice, "B L"],
    where: Bool[Array, "B L"],
) -> TokenStats:
    """−log p(target) of each token `where` says so, differentiable, and its other statistics."""
    return _with_head(token_losses, model, hidden, targets, where, out_specs=_TOKENS)


_TOKENS = cut("batch", "length")


@jax.custom_vjp
def _together(hidden, param):
    """What it is given. In the backward pass both gradients have to be there before one is used:
    the head's, fp32 and whole on every device, would else wait for its sum until the layers are
    through, beside everything that they need."""
    return hidden, param


_together.defvjp(
    lambda *arrays: (arrays, None), lambda _, grads: jax.lax.optimization_barrier(grads)
)


def _with_head(function, model: Transformer, hidden, targets, *others, out_specs):
    """function(hidden, head, targets, *others), on each device's tokens and vocabulary."""
    param, vocab_axis = model.output_parameter
    hidden, param = _together(hidden, param)

    def local(param, hidden, *per_token):
        options = {"vocab_axis": vocab_axis, "axis_name": manual_axis("vocab")}
        return function(hidden, gathered(param, param.dtype), *per_token, **options)

    arrays = hidden, jnp.asarray(targets), *others
    specs = [_TOKENS] * len(arrays)
    return on_shards(local, param, *arrays, specs=specs, out_specs=out_specs)


def weighted(values: HostOrDevice, weights: HostOrDevice) -> WeightedSum:
    """Σ values·weights over Σ weights, fp32."""
    values, weights = jnp.asarray(values, jnp.float32), jnp.asarray(weights, jnp.float32)
    return WeightedSum((values * weights).sum(), weights.sum())


def prediction_metrics(stats: TokenStats, counted: Bool[Array, "B L"]) -> dict[str, WeightedSum]:
    """Over the counted tokens: how often the most probable id is right (accuracy), and how
    probable it is (confidence)."""
    return {
        "accuracy": weighted(stats.correct, counted),
        "confidence": weighted(stats.confidence, counted),
    }
