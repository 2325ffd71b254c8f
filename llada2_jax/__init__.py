"""LLaDA2.0 (arXiv 2512.15745) in JAX: autoregressive models become block-diffusion models."""

__version__ = "0.1.0"
