"""Rematerialisation: what of a layer's forward is kept for its backward."""

from __future__ import annotations

from collections.abc import Callable

import jax

# name -> what wraps the body of the scan over layers
POLICIES: dict[str, Callable[[Callable], Callable]] = {
    "none": lambda body: body,
    "full": lambda body: jax.checkpoint(body, prevent_cse=False),
    "dots": lambda body: jax.checkpoint(
        body, prevent_cse=False, policy=jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    ),
}
