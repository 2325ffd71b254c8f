"""Checksums notice every flipped bit, and do not depend on the layout."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada2_jax import checkpoint
from llada2_jax.checksums import box_checksum, json_checksum, seal, tree_checksums, unseal

DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool", "float8_e4m3fn"]


def checksum_of(array) -> int:
    return int(tree_checksums({"x": jnp.asarray(array)})["x"])


def sample(shape, dtype="float32", seed=0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(jnp.dtype(dtype))


def reference(array: np.ndarray) -> int:
    """The docstring's formula, one element at a time, in Python's integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
        x = (x ^ (x >> 13)) * 0xC2B2AE35 % 2**32
        return x ^ (x >> 16)

    total = 0
    for index in np.ndindex(array.shape):
        key = 0
        for i in index:
            key = mix((key * 0x9E3779B1 + i + 1) % 2**32)
        total += mix(int.from_bytes(array[index].tobytes(), "little") ^ key)
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)])
def test_the_formula(shape, dtype):
    array = np.asarray(sample(shape, dtype))
    assert checksum_of(array) == reference(array)


@given(position=st.integers(0, 59), bit=st.integers(0, 31))
def test_a_flipped_bit_changes_it(position, bit):
    array = sample((3, 4, 5))
    flipped = array.copy()
    flipped.view(np.uint32).reshape(-1)[position] ^= np.uint32(1 << bit)
    assert checksum_of(array) != checksum_of(flipped)


def test_elements_that_change_places_change_it():
    array = sample((4, 6))
    assert checksum_of(array) != checksum_of(array[::-1])
    assert checksum_of(array) != checksum_of(array.reshape(6, 4))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_slices_add_up(dtype):
    array = sample((5, 6, 7), dtype)
    shares = [box_checksum(array[box], box) for box in checkpoint.boxes((5, 6, 7), (2, 4, 7))]
    assert sum(shares) % 2**32 == checksum_of(array) and len(set(shares)) == len(shares)
    assert box_checksum(sample(()), ()) == checksum_of(sample(()))


def test_an_item_is_sealed():
    item = seal({"a": 1, "b": 2})
    assert unseal(item) == {"a": 1, "b": 2}
    with pytest.raises(ValueError, match="themselves damaged"):
        unseal({**item, "arrays": {"a": 1, "b": 3}})
    with pytest.raises(ValueError, match="unreadable"):
        unseal(["a"])
    assert json_checksum({"a": 1, "b": 2.5}) == json_checksum({"b": 2.5, "a": 1})


def test_float64_words_are_all_covered():
    with jax.enable_x64(True):
        array = np.asarray([1.0, 2.0, 3.0])
        flipped = array.copy()
        flipped.view(np.uint64)[1] ^= np.uint64(1 << 40)
        assert checksum_of(array) != checksum_of(flipped)
