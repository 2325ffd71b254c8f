"""Parameters from files straight to the devices that hold them."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array

from llada2_jax import checkpoint
from llada2_jax.checkpoint import Box, ParamReader, Source
from llada2_jax.checksums import tree_checksums
from llada2_jax.sharding import shardings
from llada2_jax.types import Params


def read_placed(source: Source, abstract: Params, mesh: Mesh) -> dict[str, Array]:
    """All parameters as `abstract` wants them, cut by the mesh.

    Each process reads what its devices hold, one parameter at a time, so that a host needs memory
    for its part of the largest one. A checkpoint's checksums are verified on the devices.

    Raises: CheckpointError that names what is missing, extra, misshapen or damaged.
    """
    wanted = checkpoint.flatten(abstract)
    checkpoint.check_shapes({path: x.shape for path, x in wanted.items()}, source.specs)
    placed = checkpoint.flatten(shardings(abstract, mesh))
    arrays = {}
    for path, want in wanted.items():
        array = _read(source, path, placed[path])
        if isinstance(source, ParamReader):
            source.verify(path, int(tree_checksums({"": array})[""]))  # one program a shape
        arrays[path] = _cast(array, np.dtype(want.dtype), placed[path])
    return arrays


def _read(source: Source, path: str, sharding: jax.sharding.Sharding) -> Array:
    spec = source.specs[path]
    indices = sharding.addressable_devices_indices_map(spec.shape).values()
    parts: dict[tuple[tuple[int, int], ...], np.ndarray] = {}
    for index in indices:
        bounds = _bounds(index or (), spec.shape)
        if bounds not in parts:
            parts[bounds] = np.empty([stop - start for start, stop in bounds], spec.dtype)
    for box in source.boxes(path):
        _fill(parts, source, path, _bounds(box, spec.shape))
    return jax.make_array_from_callback(
        spec.shape, sharding, lambda index: parts[_bounds(index or (), spec.shape)]
    )


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple[tuple[int, int], ...]:
    """(start, stop) on every axis."""
    index = (*index, *(slice(None),) * (len(shape) - len(index)))
    return tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))


def _fill(parts: Mapping[tuple, np.ndarray], source: Source, path: str, box: tuple) -> None:
    """Reads a box, if any part needs something of it, and copies that."""
    value: Any = None
    for bounds, part in parts.items():
        shared = [(max(a, c), min(b, d)) for (a, b), (c, d) in zip(bounds, box, strict=True)]
        if any(start >= stop for start, stop in shared):
            continue
        if value is None:
            value = source.read(path, tuple(slice(*axis) for axis in box))
        part[_within(shared, bounds)] = value[_within(shared, box)]


def _within(shared: list[tuple[int, int]], bounds: tuple[tuple[int, int], ...]) -> Box:
    pairs = zip(shared, bounds, strict=True)
    return tuple(slice(start - first, stop - first) for (start, stop), (first, _) in pairs)


def _cast(array: Array, dtype: np.dtype, sharding: Any) -> Array:
    if array.dtype == dtype:
        return array
    return _caster(dtype, sharding)(array)


@functools.lru_cache
def _caster(dtype: np.dtype, sharding: Any):
    """One for all leaves of a sharding: those of one shape share a program."""
    return jax.jit(functools.partial(jax.numpy.asarray, dtype=dtype), out_shardings=sharding)
