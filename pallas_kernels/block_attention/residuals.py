"""The name of what a training kernel keeps for its backward pass, for policies of jax.checkpoint.

A kernel is opaque to a policy that keeps matrix products: unless its outputs are kept by name
(`jax.checkpoint_policies.save_only_these_names(KEPT)`), the forward kernel runs a second time. They
take as much memory as the queries, and one number a query and head.
"""

from __future__ import annotations

import jax
from jax.ad_checkpoint import checkpoint_name

KEPT = "block_attention_outputs"


def named(*outputs: jax.Array) -> tuple[jax.Array, ...]:
    """The forward kernel's outputs under the name KEPT."""
    return tuple(checkpoint_name(x, KEPT) for x in outputs)
