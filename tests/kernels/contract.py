"""What every attention backend has to do: one class, inherited by the tests of each backend.

A backend's test is a subclass named Test… that says how to call it:

    class TestMine(AttentionContract):
        @staticmethod
        def attend(q, k, v, layout): ...

The cases are a covering selection. What is static, so that a kernel is compiled for it, comes in
few combinations, PROGRAMS; with these and among each other, every pair of values of the factors
that are data occurs in one of the cases. `KERNEL_CASES=all` in the environment runs the whole
product instead. A backend that is slow to interpret names fewer `cases`, a smaller `shape` and
fewer `examples`; what it has to do stays.
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
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.block_attention.reference import attend_reference
from pallas_kernels.block_layout import (
    PADDING,
    BlockLayout,
    block_index,
    both_halves,
)
from pallas_kernels.shapes import ATTENTION, DOCUMENTS, AttentionShape, packed_layout

ROWS = 2
SHAPES = {
    # Heads, rows, and tokens of a row; none fills its tiles.
    "tiny": (ATTENTION["tiny"], ROWS, 300),
    "mini": (ATTENTION["mini"], ROWS, 160),
    "flash": (ATTENTION["flash"], ROWS, 160),
    # For kernels that take these head sizes only, and minutes for more heads.
    "pair": (AttentionShape(heads=2, kv_heads=1, head_dim=64), 1, 70),
    "four": (AttentionShape(heads=4, kv_heads=1, head_dim=64), 1, 70),
    "wide": (AttentionShape(heads=4, kv_heads=2, head_dim=128), 1, 40),
}
ROW = "row"  # as a block size: as many tokens as the row

FACTORS = {
    "shape": ("tiny", "mini", "flash"),
    "halves": ("both", "noisy", "clean"),
    "dtype": ("float32", "bfloat16"),
    "block_size": (1, 4, 32, 64, ROW),
    "documents": DOCUMENTS,
    "anchor": ("document", "row"),
    "padding": (0, 21),
}

# Values of the first three factors; each of them is in one.
PROGRAMS = (
    ("tiny", "both", "float32"),
    ("tiny", "clean", "bfloat16"),
    ("mini", "both", "bfloat16"),
    ("flash", "noisy", "float32"),
)


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
        _, rows, length = SHAPES[self.shape]
        size = length if self.block_size == ROW else int(self.block_size)
        return packed_layout(
            np.random.default_rng(zlib.crc32(str(self).encode())),
            rows,
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
    """Cases of PROGRAMS in which all pairs of values of two factors meet, chosen greedily."""

    def pairs(case):
        return set(itertools.combinations(enumerate(dataclasses.astuple(case)), 2))

    of_programs = (c for c in product() if (c.shape, c.halves, c.dtype) in PROGRAMS)
    candidates = {case: pairs(case) for case in of_programs}
    missing, chosen = set().union(*candidates.values()), []
    while missing:
        best = max(candidates, key=lambda case: len(candidates[case] & missing))
        missing -= candidates.pop(best)
        chosen.append(best)
    return chosen


EVERY = os.environ.get("KERNEL_CASES") == "all"
CASES = product() if EVERY else covering()

Attend = Callable[[jax.Array, jax.Array, jax.Array, BlockLayout], jax.Array]


def draw_inputs(layout: BlockLayout, shape: str, dtype: str) -> tuple[jax.Array, ...]:
    """q, k, v and the cotangent of the output, all of variance 1."""
    heads, *_ = SHAPES[shape]
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
    """Inherit, define `attend`, and change what follows where the backend's limits are others.

    cases: to compare with the oracle. shape, dtype, length: of the other tests' rows. examples: of
    the property.
    """

    cases: Sequence[Case] = CASES
    # As the first of PROGRAMS.
    shape, dtype, length, examples = "tiny", "float32", 300, 8
    tolerance = {"float32": 1e-5, "float16": 4e-3, "bfloat16": 2e-2}

    @staticmethod
    def attend(q, k, v, layout):
        raise NotImplementedError

    def pytest_generate_tests(self, metafunc):
        if "case" in metafunc.fixturenames:
            metafunc.parametrize("case", self.cases, ids=str)

    def run(self, *args):
        return output_and_gradients(type(self).attend)(*args)

    def inputs(self, layout):
        return draw_inputs(layout, self.shape, self.dtype)

    def assert_matches_the_oracle(self, inputs, layout):
        exact = oracle(*(x.astype(jnp.float32) for x in inputs), layout)
        tolerance = self.tolerance[inputs[0].dtype.name]
        assert_close(self.run(*inputs, layout), exact, tolerance)

    def test_matches_the_oracle(self, case: Case):
        layout = case.layout()
        self.assert_matches_the_oracle(draw_inputs(layout, case.shape, case.dtype), layout)

    def test_any_row_matches_the_oracle(self):
        rows = st.tuples(*[any_row(self.length)] * ROWS)
        size = st.integers(1, self.length)

        @settings(max_examples=self.examples, deadline=None, derandomize=True)
        @given(rows=rows, size=size, anchor=st.sampled_from(["document", "row"]))
        def check(rows, size, anchor):
            segments, positions = map(np.concatenate, zip(*rows, strict=True))
            layout = both_halves(block_index(positions, size, anchor), segments)
            self.assert_matches_the_oracle(self.inputs(layout), layout)

        check()

    def test_tokens_without_a_document_reach_nothing_and_give_zeros(self):
        layout = packed_layout(
            np.random.default_rng(1),
            ROWS,
            self.length,
            "straddling",
            block_size=32,
            padding=self.length // 4,
        )
        unused = (layout.segment == PADDING)[..., None, None]
        q, k, v, cotangent = self.inputs(layout)

        def filled(*values):
            """With these values in turn in the unused tokens."""
            turns = np.resize(np.asarray(values), unused.shape)
            fill = jnp.asarray(turns, self.dtype)
            return self.run(*(jnp.where(unused, fill, x) for x in (q, k, v)), cotangent, layout)

        garbage = filled(np.nan, np.inf, -np.inf)
        for name, x, y in zip(("output", "dq", "dk", "dv"), garbage, filled(0.0), strict=True):
            np.testing.assert_array_equal(x, y, err_msg=name)
            assert not np.where(unused, x, 0).any(), f"{name} of padding is not zero"

    def test_rows_of_padding_give_zeros(self):
        block = jnp.zeros((ROWS, self.length), jnp.int32)
        layout = both_halves(block, block)
        for x in self.run(*self.inputs(layout), layout):
            assert not np.asarray(x).any()

    def test_repeats_to_the_bit(self):
        layout = packed_layout(
            np.random.default_rng(2), ROWS, self.length, "straddling", block_size=32
        )
        inputs = self.inputs(layout)
        for x, y in zip(self.run(*inputs, layout), self.run(*inputs, layout), strict=True):
            np.testing.assert_array_equal(x, y)
