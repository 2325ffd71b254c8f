"""What every attention backend has to do: one class, inherited by the tests of each backend.

A backend's test is a subclass named Test… that says how to call it:

    class TestMine(AttentionContract):
        @staticmethod
        def attend(q, k, v, layout): ...

The cases are a covering selection: every pair of values of any two factors occurs in one of them.
`KERNEL_CASES=all` in the environment runs their whole product instead.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_layout import (
    PADDING,
    BlockLayout,
    block_index,
    both_halves,
)
from pallas_kernels.shapes import ATTENTION, DOCUMENTS, packed_layout

ROWS = 2
LENGTHS = {"tiny": 300, "mini": 160, "flash": 160}  # tokens; none fills its tiles
ROW = "row"  # as a block size: as many tokens as the row

FACTORS = {
    "shape": tuple(LENGTHS),
    "halves": ("both", "noisy", "clean"),
    "dtype": ("float32", "bfloat16"),
    "block_size": (1, 4, 32, 64, ROW),
    "documents": DOCUMENTS,
    "anchor": ("document", "row"),
    "padding": (0, 21),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One value of every factor."""

    shape: str
    halves: str
    dtype: str
    block_size: int | str
    documents: str
    anchor: str
    padding: int

    def __str__(self) -> str:
        return "-".join(map(str, dataclasses.astuple(self)))

    def layout(self) -> BlockLayout:
        length = LENGTHS[self.shape]
        size = length if self.block_size == ROW else int(self.block_size)
        return packed_layout(
            np.random.default_rng(zlib.crc32(str(self).encode())),
            ROWS,
            length,
            self.documents,
            block_size=size,
            anchor=self.anchor,
            halves=self.halves,
            padding=self.padding,
        )


def product() -> list[Case]:
    return [Case(*values) for values in itertools.product(*FACTORS.values())]


def covering() -> list[Case]:
    """Cases in which every pair of values of two factors meets, chosen greedily."""

    def pairs(case):
        return set(itertools.combinations(enumerate(dataclasses.astuple(case)), 2))

    candidates = {case: pairs(case) for case in product()}
    missing, chosen = set().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda case: len(candidates[case] & missing))
        missing -= candidates.pop(best)
        chosen.append(best)
    return chosen


CASES = product() if os.environ.get("KERNEL_CASES") == "all" else covering()

Attend = Callable[[jax.Array, jax.Array, jax.Array, BlockLayout], jax.Array]


def draw_inputs(layout: BlockLayout, shape: str, dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output, all of variance 1."""
    heads = ATTENTION[shape]
    batch, length = layout.block.shape
    counts = (heads.heads, heads.kv_heads, heads.kv_heads, heads.heads)
    rng = np.random.default_rng(0)
    return tuple(
        jnp.asarray(rng.standard_normal((batch, length, n, heads.head_dim)), dtype) for n in counts
    )


@functools.cache
def output_and_gradients(attend: Attend):
    """(q, k, v, cotangent, layout) -> (output, dq, dk, dv), compiled once a shape and spans."""

    def run(q, k, v, cotangent, layout):
        output, pull = jax.vjp(lambda q, k, v: attend(q, k, v, layout), q, k, v)
        return output, *pull(cotangent)

    return jax.jit(run)


@output_and_gradients
def oracle(q, k, v, layout):
    return attend_reference(q, k, v, layout, layout)


def assert_close(actual: Sequence[jax.Array], expected: Sequence[jax.Array], tolerance: float):
    """Absolutely, in units of the largest expected value where that is above 1."""
    for name, x, y in zip(("output", "dq", "dk", "dv"), actual, expected, strict=True):
        x, y = np.asarray(x, np.float32), np.asarray(y, np.float32)
        scale = max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * scale, err_msg=name)


@st.composite
def any_row(draw, length: int):
    """Segments and positions of one row: any documents, any padding at the end."""
    cuts = sorted(draw(st.sets(st.integers(1, length - 1), max_size=8)))
    padding = draw(st.integers(0, length))
    segments = np.searchsorted(cuts, np.arange(length), side="right") + 1
    starts = np.flatnonzero(np.diff(segments, prepend=0))
    positions = np.arange(length) - np.repeat(starts, np.diff(starts, append=length))
    segments[length - padding :] = PADDING
    return segments.astype(np.int32)[None], positions.astype(np.int32)[None]


class AttentionContract:
    """Inherit, define `attend`, and change what follows where the backend's limits are others."""

    dtypes = ("float32", "bfloat16")
    tolerance = {"float32": 1e-5, "bfloat16": 2e-2}

    @staticmethod
    def attend(q, k, v, layout):
        raise NotImplementedError

    def run(self, *args):
        return output_and_gradients(type(self).attend)(*args)

    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_matches_the_oracle(self, case: Case):
        if case.dtype not in self.dtypes:
            pytest.skip(f"{case.dtype} is not supported")
        layout = case.layout()
        inputs = draw_inputs(layout, case.shape, case.dtype)
        exact = oracle(*(x.astype(jnp.float32) for x in inputs), layout)
        assert_close(self.run(*inputs, layout), exact, self.tolerance[case.dtype])

    # Every backend inherits the property; with derandomize none replays another's examples.
    @settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.differing_executors],
    )
    @given(data=st.data(), size=st.integers(1, 140), anchor=st.sampled_from(["document", "row"]))
    def test_any_row_matches_the_oracle(self, data, size, anchor):
        segments, positions = data.draw(any_row(140))
        layout = both_halves(block_index(positions, size, anchor), segments)
        inputs = draw_inputs(layout, "tiny", "float32")
        assert_close(self.run(*inputs, layout), oracle(*inputs, layout), self.tolerance["float32"])

    @pytest.mark.parametrize("garbage", [np.nan, np.inf])
    def test_tokens_without_a_document_reach_nothing_and_give_zeros(self, garbage):
        layout = packed_layout(
            np.random.default_rng(1), ROWS, 140, "straddling", block_size=32, padding=37
        )
        unused = (layout.segment == PADDING)[..., None, None]
        q, k, v, cotangent = draw_inputs(layout, "tiny", "float32")
        clean = self.run(*(jnp.where(unused, 0.0, x) for x in (q, k, v)), cotangent, layout)
        dirty = self.run(*(jnp.where(unused, garbage, x) for x in (q, k, v)), cotangent, layout)
        for name, x, y in zip(("output", "dq", "dk", "dv"), dirty, clean, strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
            assert not np.where(unused, x, 0).any(), f"{name} of padding is not zero"

    def test_a_row_of_padding_gives_zeros(self):
        block = jnp.zeros((1, 140), jnp.int32)
        layout = both_halves(block, block)
        for x in self.run(*draw_inputs(layout, "tiny", "float32"), layout):
            assert not np.asarray(x).any()

    def test_repeats_to_the_bit(self):
        layout = packed_layout(np.random.default_rng(2), ROWS, 140, "straddling", block_size=32)
        inputs = draw_inputs(layout, "tiny", "float32")
        for x, y in zip(self.run(*inputs, layout), self.run(*inputs, layout), strict=True):
            np.testing.assert_array_equal(x, y)
