"""AdamW, as the config says it."""

from __future__ import annotations

import jax
import optax

from llada2_jax.config import TrainConfig
from llada2_jax.schedules import learning_rate


def make_optimizer(cfg: TrainConfig) -> optax.GradientTransformation:
    """Clipped AdamW under the run's learning-rate schedule; no decay on norm scales."""
    opt = cfg.optimizer
    return optax.chain(
        optax.clip_by_global_norm(opt.clip_norm) if opt.clip_norm else optax.identity(),
        optax.adamw(
            learning_rate(opt, cfg.total_steps),
            b1=opt.b1,
            b2=opt.b2,
            eps=opt.eps,
            weight_decay=opt.weight_decay,
            mask=_decayed,
        ),
    )


def _decayed(params):
    """True for matrices. Norm scales, also those stacked over layers, are called `scale`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: "scale" not in jax.tree_util.keystr(path), params
    )
