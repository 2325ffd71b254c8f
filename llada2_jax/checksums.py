"""Checksums of arrays that do not depend on how an array is laid out.

Storage can return other bits than were written, and Orbax restores them without a word. So a
checkpoint carries a checksum of each array *as it was on the devices*, and what is restored is
summed again on the devices: everything in between is covered.

    checksum = Σ mix(bits of the element ^ key(its index))   (mod 2^32)

The sum runs in any order: each device adds up its shards, slices can be summed one at a time, and
the mesh and process count of the reader may differ from the writer's. mix is a bijection, so one
changed element always changes the sum; other damage goes unseen with probability 2^-32.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt32


def checksum(x: Array, start: Sequence[Any] = ()) -> UInt32[Array, ""]:
    """Checksum of an array of any dtype of at least 8 bits, or the share of one of its slices.

    start: index of the slice's first element in the whole array; default the origin. The shares
    of slices that cover an array once add up, mod 2^32, to its checksum.
    """
    start = tuple(start) or (0,) * x.ndim
    words = _words(x)
    key = jnp.zeros((), jnp.uint32)
    for size, first in zip(words.shape, (*start, 0), strict=False):
        index = jnp.arange(size, dtype=jnp.uint32) + jnp.asarray(first).astype(jnp.uint32)
        key = _mix(key[..., None] * jnp.uint32(0x9E3779B1) + index + jnp.uint32(1))
    return jnp.sum(_mix(words ^ key), dtype=jnp.uint32)


def _words(x: Array) -> UInt32[Array, "..."]:
    """The bits of each element, in a new last axis where it has more than 32."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint32)
    width = x.dtype.itemsize * 8
    words = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(width, 32)}"))
    return words.astype(jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32 bits in which each bit depends on all (the finaliser of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


@jax.jit
def tree_checksums(leaves: Mapping[str, Array]) -> dict[str, UInt32[Array, ""]]:
    """{name: checksum} as device scalars, replicated: every process can read all of them."""
    return {name: checksum(leaf) for name, leaf in leaves.items()}


def box_checksum(value: np.ndarray, box: tuple[slice, ...]) -> int:
    """The share of a slice that is in host memory, computed on the host's CPU. box: () is all."""
    start = [axis.start or 0 for axis in box] or [0] * value.ndim
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        return int(_box_checksum(value, [np.uint32(first) for first in start]))


_box_checksum = jax.jit(checksum)


def json_checksum(value: Any) -> int:
    """CRC-32 of the content of a JSON value, however it is written."""
    plain = json.loads(json.dumps(value))  # tuples and keys as they come back from a file
    text = json.dumps(plain, sort_keys=True, separators=(",", ":"))
    return zlib.crc32(text.encode())


def seal(checksums: Mapping[str, int]) -> dict[str, Any]:
    """A JSON item of checksums, with one of its own."""
    return {"arrays": dict(checksums), "seal": json_checksum(dict(checksums))}


def unseal(item: Any) -> dict[str, int]:
    """The inverse of `seal`. Raises: ValueError where the item is not what was sealed."""
    if not isinstance(item, dict) or not isinstance(item.get("arrays"), dict):
        raise ValueError("its checksums are unreadable")
    if json_checksum(item["arrays"]) != item.get("seal"):
        raise ValueError("its checksums are themselves damaged")
    return item["arrays"]
