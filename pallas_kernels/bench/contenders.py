"""What the benchmark of time compares: our backends and what else one could call.

A contender is built for one case and gives two calls, forward and forward + backward, that start
the work; `wait` waits for it. Building raises where it cannot run; the reason goes into the table.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.block_attention import attend_reference, block_attention
from pallas_kernels.block_attention.splash import TILE
from pallas_kernels.block_layout import BlockLayout, allowed
from pallas_kernels.shapes import AttentionShape, packed_layout


@dataclasses.dataclass(frozen=True)
class Case:
    """One row batch of both halves; blocks are cut on row indices, since static masks know no
    others."""

    shape: AttentionShape
    rows: int
    length: int
    block_size: int
    documents: str | int

    @functools.cached_property
    def layout(self) -> BlockLayout:
        rng = np.random.default_rng(0)
        size, kind = self.block_size, self.documents
        return packed_layout(rng, self.rows, self.length, kind, block_size=size, anchor="row")

    @functools.cached_property
    def inputs(self) -> tuple[jax.Array, ...]:
        """bf16 cotangent of the output, q, k, v."""
        heads = (self.shape.heads,) * 2 + (self.shape.kv_heads,) * 2
        keys = jax.random.split(jax.random.key(0), 4)
        return tuple(
            jax.random.normal(key, (self.rows, 2 * self.length, n, self.shape.head_dim), "bfloat16")
            for key, n in zip(keys, heads, strict=True)
        )


@dataclasses.dataclass(frozen=True)
class Calls:
    """forward, both: start the work and return what `wait` waits for. read: the result of forward
    as fp32 [rows, positions, heads, head_dim]."""

    forward: Callable[[], Any]
    both: Callable[[], Any]
    wait: Callable[[Any], Any] = jax.block_until_ready
    read: Callable[[Any], np.ndarray] = lambda output: np.asarray(output, np.float32)


def _jax(case: Case, attend: Callable[..., jax.Array], *extra: Any) -> Calls:
    """attend: (q, k, v, *extra) -> output; extra: arrays that take no gradient."""
    cotangent, *inputs = case.inputs

    def both(cotangent, extra, *inputs):
        output, pull = jax.vjp(lambda *inputs: attend(*inputs, *extra), *inputs)
        return output, *pull(cotangent)

    forward, both = jax.jit(attend), jax.jit(both)
    return Calls(lambda: forward(*inputs, *extra), lambda: both(cotangent, extra, *inputs))


def _backend(name: str) -> Callable[[Case], Calls]:
    def attend(q, k, v, layout):
        return block_attention(q, [(k, v, layout)], layout, backend=name)

    return lambda case: _jax(case, attend, case.layout)


def _reference(case: Case) -> Calls:
    return _jax(case, lambda q, k, v, at: attend_reference(q, k, v, at, at), case.layout)


def _cudnn_dense_bias(case: Case) -> Calls:
    def attend(q, k, v, bias):
        return jax.nn.dot_product_attention(q, k, v, bias=bias, implementation="cudnn")

    mask = allowed(case.layout, case.layout)[:, None]
    bias = jnp.where(mask, 0.0, jnp.finfo(jnp.bfloat16).min).astype(jnp.bfloat16)
    return _jax(case, attend, bias)


def _tokamax_dense_mask(case: Case) -> Calls:
    import tokamax

    def attend(q, k, v, mask):
        return tokamax.dot_product_attention(q, k, v, mask=mask, implementation="mosaic")

    return _jax(case, attend, allowed(case.layout, case.layout)[:, None])


def _stock_splash(case: Case) -> Calls:
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    length, size, tile = case.length, case.block_size, min(TILE, 2 * case.length)

    @dataclasses.dataclass(frozen=True)
    class Inside:
        """The rule of row-anchored blocks on indices of [noisy ; clean]."""

        length: int
        size: int

        def __call__(self, q, k):
            q_clean, k_clean = q >= self.length, k >= self.length
            q_block, k_block = (q % self.length) // self.size, (k % self.length) // self.size
            own = (q_block == k_block) & (q_clean == k_clean)
            return own | (k_clean & (k_block < q_block))

    class Mask(masks._ComputableMask):
        def __eq__(self, other):
            return isinstance(other, Mask) and self.mask_function == other.mask_function

        def __hash__(self):
            return hash((self.shape, self.mask_function))

    mask = Mask((2 * length, 2 * length), Inside(length, size))
    names = ("block_q", "block_kv", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq")
    kernel = kernels.make_splash_mha(
        masks.MultiHeadMask([mask] * case.shape.heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=kernels.BlockSizes(**dict.fromkeys(names, tile)),
    )

    def attend(q, k, v, segment):
        q = (q.astype(jnp.float32) * q.shape[-1] ** -0.5).astype(q.dtype)
        q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
        ids = kernels.SegmentIds(segment, segment)
        output: Any = jax.vmap(kernel)(q, k, v, segment_ids=ids)
        return output.swapaxes(1, 2)

    return _jax(case, attend, case.layout.segment)


def _flex_attention(case: Case) -> Calls:
    import torch  # pyright: ignore[reportMissingImports]
    from torch.nn.attention.flex_attention import (  # pyright: ignore[reportMissingImports]
        create_block_mask,
        flex_attention,
    )

    if not torch.cuda.is_available():
        raise NotImplementedError("torch sees no CUDA device")
    length, size = case.length, case.block_size

    def tensor(x):
        return torch.tensor(np.asarray(x, np.float32)).to("cuda", torch.bfloat16).transpose(1, 2)

    cotangent, *inputs = (tensor(x).contiguous() for x in case.inputs)
    for x in inputs:
        x.requires_grad_()
    segment = torch.tensor(np.asarray(case.layout.segment)).cuda()

    def inside(batch, head, q, k):
        q_clean, k_clean = q >= length, k >= length
        q_block, k_block = (q % length) // size, (k % length) // size
        own = (q_block == k_block) & (q_clean == k_clean)
        same = segment[batch, q] == segment[batch, k]
        return same & (own | (k_clean & (k_block < q_block)))

    mask = create_block_mask(inside, case.rows, None, 2 * length, 2 * length, device="cuda")
    attend = torch.compile(flex_attention)

    def forward():
        with torch.no_grad():
            return attend(*inputs, block_mask=mask, enable_gqa=True)

    def both():
        output = attend(*inputs, block_mask=mask, enable_gqa=True)
        return torch.autograd.grad(output, inputs, cotangent)

    return Calls(
        forward,
        both,
        wait=lambda _: torch.cuda.synchronize(),
        read=lambda output: output.transpose(1, 2).float().cpu().numpy(),
    )


CONTENDERS: dict[str, dict[str, Callable[[Case], Calls]]] = {
    "tpu": {
        "tpu": _backend("tpu"),
        "splash": _backend("splash"),
        "jax splash": _stock_splash,
        "xla": _backend("xla"),
    },
    "gpu": {
        "gpu": _backend("gpu"),
        "triton": _backend("triton"),
        "FlexAttention": _flex_attention,
        "cuDNN, dense bias": _cudnn_dense_bias,
        "tokamax, dense mask": _tokamax_dense_mask,
        "xla": _backend("xla"),
    },
    "cpu": {"xla": _backend("xla"), "reference": _reference},
}
"""By platform; the first is what the others are compared with."""
