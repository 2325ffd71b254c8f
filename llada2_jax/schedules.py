"""Learning rate, block-size phases and the embedding noise over a run."""

from __future__ import annotations

import optax

from llada2_jax.config import EmbeddingNoiseConfig, OptimizerConfig, TrainConfig


def learning_rate(cfg: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Warmup - stable - decay: linear up, constant, linear down to final_fraction."""
    warmup = max(1, round(cfg.warmup_fraction * total_steps))
    decay = max(1, round(cfg.decay_fraction * total_steps))
    peak = cfg.learning_rate
    return optax.join_schedules(
        [
            optax.linear_schedule(peak / warmup, peak, warmup),
            optax.constant_schedule(peak),
            optax.linear_schedule(peak, peak * cfg.final_fraction, decay),
        ],
        [warmup, max(warmup, total_steps - decay)],
    )


def embedding_noise_sigma(cfg: TrainConfig, step: int) -> float:
    """Scale of the masked-embedding noise at a step: linear to 0 from the first diffusion step."""
    noise: EmbeddingNoiseConfig = cfg.embedding_noise
    if not noise.sigma or not noise.tokens:
        return 0.0
    start = 0
    for phase, end in zip(cfg.phases, cfg.phase_ends, strict=True):
        if phase.objective != "ar":
            break
        start = end
    seen = (step - start) * cfg.tokens_per_step
    return noise.sigma * max(0.0, 1.0 - seen / noise.tokens) if step >= start else 0.0
