"""Confidence-aware parallel training (§5.2): be sure of what is right."""

from __future__ import annotations

import dataclasses

from llada2_jax.model import Transformer
from llada2_jax.objectives.base import Context, LossOutput
from llada2_jax.objectives.bdlm import denoising_loss, draw_noise
from llada2_jax.types import Batch, WeightedSum


def cap_objective(model: Transformer, batch: Batch, context: Context) -> LossOutput:
    """L_SFT + λ · L_conf (eq. 6). L_conf is the mean over the supervised masked tokens of the
    entropy of p(·|x_t) where its most probable id is the right one, and 0 elsewhere.

    Which tokens are right is a constant to differentiation. The two means have denominators of
    their own; the output has that of L_SFT, so the entropies are weighed by the ratio of the two
    over the whole batch, which `with_supervised_per_masked` puts into the context.
    """
    draw = draw_noise(batch, context)
    scale = context.cap.weight * context.supervised_per_masked
    return denoising_loss(
        model, draw, context, clean_half=True, entropy_weights=draw.masked * scale
    )


def with_supervised_per_masked(batch: Batch, context: Context) -> Context:
    """The context for parts of `batch`: the noise is known before any forward pass."""
    draw = draw_noise(batch, context)
    ratio = WeightedSum(draw.supervised.sum(), draw.masked.sum()).mean()
    return dataclasses.replace(context, supervised_per_masked=ratio)
