"""Rematerialisation: what of a layer's forward is kept for its backward."""

from __future__ import annotations

from collections.abc import Callable

import jax

from pallas_kernels.block_attention import KEPT

DISPATCH = "expert_dispatch"
"""Name of the experts' slots: a few integers, which are counted by a large matrix product."""

# Matrix products with weights, and what the attention kernels make, which jax cannot look into.
_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names(KEPT, DISPATCH),
)

# name -> what wraps the body of the scan over layers
POLICIES: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),
    "dots": lambda body: jax.checkpoint(body, prevent_cse=False, policy=_DOTS),
}
