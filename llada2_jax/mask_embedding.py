"""The embedding row that becomes the mask token's."""

from __future__ import annotations

import numpy as np

CHOICES = ("keep", "mean", "random")


def mask_row(embedding: np.ndarray, mask_id: int, how: str, *, seed: int = 0) -> np.ndarray:
    """The mask token's new embedding.

    Args:
      embedding: [V, D], read only.
      mask_id: its row.
      how: "keep" it as trained; the "mean" of all other rows; "random": a normal with the mean and
        standard deviation of the other rows, channel by channel.

    Returns: [D], the embedding's dtype. Raises: ValueError for another `how`.
    """
    if how not in CHOICES:
        raise ValueError(f"mask embedding {how!r}: choose one of {CHOICES}")
    if how == "keep":
        return np.asarray(embedding[mask_id])
    others = np.delete(np.asarray(embedding, np.float32), mask_id, axis=0)
    row = others.mean(0)
    if how == "random":
        row = row + others.std(0) * np.random.default_rng(seed).standard_normal(row.shape)
    return row.astype(embedding.dtype)
