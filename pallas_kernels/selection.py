"""Which backend "auto" is: the first of a platform's kernels that proves itself on the device."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

logger = logging.getLogger(__name__)

TOLERANCE = 0.03
"""Of a row of an output or gradient, in units of its own length: bfloat16's rounding passes, a
missing tile of many does not."""

Prove = Callable[[str, Any], str | None]
"""(backend, device) -> what is wrong with the backend on the device, or None."""


_chosen: dict[tuple, str] = {}


def first_proven(
    what: str,
    preferences: Mapping[str, Sequence[str]],
    prove: Prove,
    where: str,
    otherwise: str = "xla",
) -> str:
    """The first backend of the platform's that is proven, or `otherwise`, which needs no proof.

    Decided once for each `what`, `where` and kind of device; also while something else is being
    traced. A kernel that is refused is a warning with the reason, and so is the choice, where there
    was one: commands show warnings; where there was none, it is an INFO. If what is being traced
    runs on several processes, a kernel has to pass on all of them, so that they agree. For a device
    that is only described, to compile for it, the first kernel is taken unproven.

    Args:
      what: that is chosen. where: all that the proof depends on beside the device.
      preferences: by platform, best first.
      prove: called for one backend after the other, until one passes.
    """
    device, present = device_at_hand()
    together = runs_on_several_processes()
    key = what, where, device.platform, device.device_kind, present, together
    if key not in _chosen:
        candidates = preferences.get(device.platform, ())
        if present or not candidates:
            _chosen[key] = _first_proven(
                what, candidates, prove, where, otherwise, device, together
            )
        else:
            _chosen[key] = candidates[0]
            _warn_once(
                f"{what}: {candidates[0]!r} for {device.device_kind}, which is not here: unproven"
            )
    return _chosen[key]


def _first_proven(
    what: str, candidates, prove: Prove, where: str, otherwise: str, device, together: bool
) -> str:
    kind = device.device_kind
    for backend in candidates:
        # A thread of its own, because a function may be under trace in this one.
        with concurrent.futures.ThreadPoolExecutor(1) as thread:
            fault = thread.submit(_fault, prove, backend, device, together).result()
        if fault is None:
            _warn_once(f"{what}: {backend!r} on {kind}, proven against the oracle")
            return backend
        logger.warning("%s: %r is not used on %s (%s): %s", what, backend, kind, where, fault)
    if candidates:
        _warn_once(f"{what}: {otherwise!r} on {kind}, since no kernel passed")
    else:
        logger.info("%s: %r on %s, which no kernel is for", what, otherwise, kind)
    return otherwise


def _fault(prove: Prove, backend: str, device, together: bool) -> str | None:
    """Of this process, or of another one."""
    try:
        fault = prove(backend, device)
    except Exception as error:  # whatever a compiler or a driver throws at a kernel
        fault = f"{type(error).__name__}: {error}"
    if not together:
        return fault
    from jax.experimental import multihost_utils

    failed = np.flatnonzero(multihost_utils.process_allgather(np.asarray(fault is not None)))
    return fault or (f"it failed on processes {failed.tolist()}" if failed.size else None)


def device_at_hand() -> tuple[Any, bool]:
    """A device of the kind that runs what is being traced, and whether it is on this machine.

    That is a device of the mesh in context, of jax_default_device, or of the default platform. A
    mesh may describe devices that are elsewhere, to compile for them.
    """
    default: Any = jax.config.jax_default_device  # pyright: ignore[reportAttributeAccessIssue]
    described = jax.sharding.get_abstract_mesh().abstract_device
    if described is None:
        if default is None or isinstance(default, str):
            default = jax.local_devices(backend=default)[0]
        return default, True
    try:
        here = jax.local_devices(backend=described.platform)
    except RuntimeError:  # jax has no such platform on this machine
        here = []
    device = next((d for d in here if d.device_kind == described.device_kind), None)
    return (described, False) if device is None else (device, True)


def runs_on_several_processes() -> bool:
    """Whether the mesh in context is larger than this process."""
    return math.prod(jax.sharding.get_abstract_mesh().axis_sizes) > jax.local_device_count()


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)


def difference(
    names: Sequence[str], actual: Sequence[jax.Array], expected: Sequence[jax.Array]
) -> str | None:
    """The first array that is off by more than TOLERANCE, in words, or None."""
    for name, x, y in zip(names, actual, expected, strict=True):
        error = float(_largest_error(x, y))
        if not error <= TOLERANCE:  # so that NaN fails
            return f"{name} is off by {error:.2g} of a row's length, {TOLERANCE} allowed"
    return None


@jax.jit
def _largest_error(x, y):
    """Of any row (the last axis), in units of that row's length; of short ones in units of a
    hundredth of the mean length."""
    x, y = x.astype(jnp.float32), y.astype(jnp.float32)
    length = jnp.linalg.norm(y, axis=-1)
    return (jnp.linalg.norm(x - y, axis=-1) / (length + 0.01 * length.mean() + 1e-30)).max()
