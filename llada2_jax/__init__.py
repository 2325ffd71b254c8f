"""LLaDA2.0 (arXiv 2512.15745) in JAX: autoregressive models become block-diffusion models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llada2_jax.engine import load

__version__ = "0.1.0.dev0"
__all__ = ["load"]


def __getattr__(name: str) -> Any:
    """`llada2_jax.load`, imported when it is first asked for: jax takes a second."""
    if name == "load":
        from llada2_jax.engine import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
