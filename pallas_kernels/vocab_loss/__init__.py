"""The output head and its losses without a [tokens, vocabulary] array."""

from pallas_kernels.vocab_loss.loss import TokenStats, chunk_rows, token_losses, vocab_loss

__all__ = ["TokenStats", "chunk_rows", "token_losses", "vocab_loss"]
