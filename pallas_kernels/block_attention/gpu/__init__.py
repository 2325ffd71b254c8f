"""Block-diffusion attention for NVIDIA GPUs, forward and backward, with work that follows the mask.

All kernels, those of the backward pass too, loop over *ranges of tiles* (`schedule`) that are
computed at run time, O(length) of them, from the key intervals of the queries: block size, block
anchor, documents and padding are data and cost no recompilation. Inside a range whole tiles take
no mask; tiles on its edges are masked exactly.

One pass, not two merged ones. The clean keys and the noisy block of a query could be two softmaxes
joined by log-sum-exp (tokamax's forward kernel takes one range a query). Here they are two ranges
of one loop: no second kernel, no extra residuals, no correction of gradients, and the block
diagonal runs on the same tensor-core tiles as everything else. tokamax is therefore not needed; its
backward kernel computes the rectangle of queries and keys, which is what this package avoids.

================  ==============================  =========================================
implementation    runs on                         arrays
================  ==============================  =========================================
`mosaic`          Hopper (compute capability 9.0)  bfloat16, float16; head_dim 64, 128; an even
                                                  number of query heads a key head
`triton`          Ampere and later                head_dim a power of two >= 16
================  ==============================  =========================================

Without a choice `attend_gpu` takes the first that fits and warns, once, why it is not `mosaic`;
where neither fits it raises, and "xla" is the backend to use. (jax calls its Pallas Triton backend
deprecated; it is the one that reaches GPUs without Hopper's instructions.)

The backward pass is two kernels, one over query tiles (dq: 3 matrix products a pair) and one over
key tiles (dk, dv: 4), instead of one with 5: a single pass would have to add dq up from many
programs with atomics, in an order that changes from run to run.

Query-key pairs computed ÷ allowed, at L = 4096, block 32, default tiles, eight rows of exponential
document lengths (`computed_pairs`; forward / backward):

==============  =============  =============  =============  =============
mean document   none           2048           1024           512
==============  =============  =============  =============  =============
mosaic          1.054 / 1.041  1.137 / 1.115  1.307 / 1.262  1.509 / 1.439
triton, mini    1.016 / 1.016  1.057 / 1.049  1.138 / 1.115  1.227 / 1.191
triton, flash   1.016 / 1.016  1.049 / 1.046  1.115 / 1.105  1.191 / 1.172
==============  =============  =============  =============  =============

What has been verified, and where (no GPU was at hand; none of this has run or been timed on one):

- triton: the attention contract in interpret mode, jax 0.12.0; lowered for sm_90 by jax 0.11.2
  and 0.12.0; its Triton code at mini and flash heads compiled for sm_80, sm_89 and sm_90 by
  Triton 3.9 (wgmma on sm_90, at most 98 KiB of shared memory; no spilled registers on sm_90).
- mosaic: outputs and gradients in jax 0.12's GPU interpreter, which simulates warpgroups,
  barriers and copies; lowered for sm_90 by jax 0.11.2 and 0.12.0; at mini heads compiled for
  sm_90a by jaxlib's own Mosaic GPU compiler and ptxas 12.9 (wgmma throughout, not serialised; no
  spills but a few scalars in the gradients of k and v; 163, 128 and 194 KiB of shared memory).
- jax's example kernel refuses causal masks on CUDA 12.8 to 12.9.0, for a miscompilation by ptxas:
  run there, these kernels too should first be compared with the oracle, as `auto` does.
"""

from pallas_kernels.block_attention.gpu.attention import (
    Implementation,
    attend_gpu,
    choose,
    computed_pairs,
    default_tiles,
)
from pallas_kernels.block_attention.gpu.schedule import Tiles

__all__ = ["Implementation", "Tiles", "attend_gpu", "choose", "computed_pairs", "default_tiles"]
