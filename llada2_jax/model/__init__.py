"""The LLaDA2 transformer: one forward for AR, training, prefill and denoising."""

from llada2_jax.model.transformer import Transformer, build, init_params, merge_params

__all__ = ["Transformer", "build", "init_params", "merge_params"]
