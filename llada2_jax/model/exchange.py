"""Rows from every device to every other, as many as each pair of them needs.

`jax.lax.ragged_all_to_all` does it on TPU and GPU. XLA has none for the CPU: there all rows are
gathered and each device picks its own, which is also what tests compare with.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class Route(NamedTuple):
    """One direction of an exchange; int32 [devices] each. starts: where what goes to a device
    begins here. sizes: rows that go to it. places: where they begin there. received: rows that
    come from it."""

    starts: Int[Array, " devices"]
    sizes: Int[Array, " devices"]
    places: Int[Array, " devices"]
    received: Int[Array, " devices"]


class Routes(NamedTuple):
    """there, back: of pairs to the devices of their experts. experts: [room], which of a device's
    own experts each received row is for; their number where nothing was received. overflow: int32,
    pairs of this device that did not go, as the receiver had no room."""

    there: Route
    back: Route
    experts: Int[Array, " room"]
    overflow: Int[Array, ""]


def expert_routes(counts: Int[Array, " E"], room: int, axis: str) -> Routes:
    """Routes of a device's pairs, sorted by expert; devices along `axis` have E / devices each.

    counts: this device's pairs of every expert. room: rows a device can receive; of more, the last
    ones stay.
    """
    devices, here = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    by_expert = jax.lax.all_gather(counts.astype(jnp.int32), axis)
    by_expert = by_expert.reshape(devices, devices, -1)  # [from, to, expert of `to`]
    wanted = by_expert.sum(2)
    ends = jnp.minimum(jnp.cumsum(wanted, 0), room)
    sent = jnp.diff(ends, axis=0, prepend=0)
    starts, places = jnp.cumsum(wanted, 1) - wanted, ends - sent
    there = Route(starts[here], sent[here], places[here], sent[:, here])
    back = Route(places[:, here], sent[:, here], starts[:, here], sent[here])
    # Received rows are sorted by (device they are from, expert).
    cells = jnp.minimum(jnp.cumsum(by_expert[:, here], 1), sent[:, here, None])
    cells = (cells + places[:, here, None]).reshape(-1)
    cell = jnp.searchsorted(cells, jnp.arange(room, dtype=jnp.int32), side="right")
    experts = by_expert.shape[2]
    expert = jnp.where(cell < cells.size, cell % experts, experts).astype(jnp.int32)
    return Routes(there, back, expert, (wanted - sent)[here].sum())


def exchange(
    rows: Float[Array, "rows D"], route: Route, back: Route, size: int, axis: str
) -> Float[Array, "size D"]:
    """What the devices along `axis` send here, zeros where nothing comes.

    back: the same exchange the other way round, which gradients take. size: of the result.
    """
    return _exchange(rows, route, back, (rows.shape[0], size), axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _exchange(rows, route: Route, back: Route, sizes: tuple[int, int], axis: str):
    return jax.lax.platform_dependent(
        rows,
        *route,
        cpu=functools.partial(_pick, size=sizes[1], axis=axis),
        default=functools.partial(_send, size=sizes[1], axis=axis),
    )


_exchange.defvjp(
    lambda rows, route, back, sizes, axis: (
        _exchange(rows, route, back, sizes, axis),
        (route, back),
    ),
    lambda sizes, axis, routes, g: (_exchange(g, *routes[::-1], sizes[::-1], axis), None, None),
)


def _send(rows, starts, sizes, places, received, *, size: int, axis: str):
    out = jnp.zeros((size, rows.shape[1]), rows.dtype)
    out = jax.lax.pcast(out, tuple(jax.typeof(rows).manual_axis_type.varying), to="varying")
    return jax.lax.ragged_all_to_all(rows, out, starts, sizes, places, received, axis_name=axis)


def _pick(rows, starts, sizes, places, received, *, size: int, axis: str):
    here, index = jax.lax.axis_index(axis), jnp.arange(size, dtype=jnp.int32)
    rows, starts, places = (jax.lax.all_gather(x, axis) for x in (rows, starts, places))
    out = jnp.zeros_like(rows, shape=(size, rows.shape[2]))
    for source in range(rows.shape[0]):
        offset = index - places[source, here]
        comes = (offset >= 0) & (offset < received[source])
        picked = jnp.take(rows[source], starts[source, here] + offset, axis=0, mode="clip")
        out = jnp.where(comes[:, None], picked, out)
    return out
