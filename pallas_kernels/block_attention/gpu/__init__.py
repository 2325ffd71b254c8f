"""Block-diffusion attention for NVIDIA GPUs."""

from pallas_kernels.block_attention.gpu.attention import (
    Tiles,
    attend_gpu,
    choose,
    computed_pairs,
    default_tiles,
)

__all__ = ["Tiles", "attend_gpu", "choose", "computed_pairs", "default_tiles"]
