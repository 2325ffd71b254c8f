"""Where arrays live: a mesh of named axes, and one table from logical axes to them.

A parameter declares logical axes once (`model.layers.parameter`); activations name theirs where
they are made. RULES says which mesh axes cut each. Model code reads the mesh that a step sets with
`meshed`, and where none is set (decoding on one device) everything here is the identity.

=========  =====================================================================================
data       rows; parameters are copied
fsdp       rows; parameters are cut and gathered where they are used
expert     rows outside the experts; inside them, experts
context    positions of a row
model      heads, feed-forward width and vocabulary (tensor parallelism)
stage      rows and storage as fsdp; inside the pipeline, layers
=========  =====================================================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from llada2_jax.config import ConfigError, MeshConfig, TrainConfig
from llada2_jax.types import Batch, ModelConfig

AXES = ("stage", "data", "fsdp", "expert", "context", "model")
"""From the outermost on: neighbours along the last ones are neighbours on the machine, and those
axes communicate most."""

RULES: dict[str, tuple[str, ...]] = {
    "batch": ("data", "fsdp", "expert", "stage"),
    "length": ("context",),
    "heads": ("model",),
    "mlp": ("model",),
    "vocab": ("model",),
    "expert": ("expert",),
    "embed": ("fsdp", "context", "expert", "stage"),  # storage only: see `gathered`
    "norm": (),
    "layers": (),  # they need not divide among stages: see model/pipeline.py
}
"""Logical axis -> the mesh axes that cut it, as far as they divide it. A mesh axis cuts an array
once: the logical axis that comes first has it."""

STORAGE_AXES = frozenset(RULES["embed"]) | {"model"}
"""Mesh axes that a large array should be cut along at least one of."""

LARGE_BYTES = 64 << 20
"""An array of more bytes than this on a device must be cut, if any axis could."""


# ---- meshes --------------------------------------------------------------------------------------


def mesh_sizes(cfg: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis; an axis of -1 gets those that the others leave.

    Raises: ConfigError where the sizes do not make up the devices.
    """
    sizes = {axis: getattr(cfg, axis) for axis in AXES}
    rest = [axis for axis, size in sizes.items() if size == -1]
    known = math.prod(size for size in sizes.values() if size != -1)
    if rest and devices % known == 0:
        sizes[rest[0]] = devices // known
    if math.prod(sizes.values()) != devices:
        shown = ", ".join(f"{axis}={sizes[axis]}" for axis in AXES if sizes[axis] != 1)
        raise ConfigError(
            f"config.mesh ({shown or 'all 1'}) does not make up {devices} devices: the product of "
            "its sizes must be that; one of them may be -1 for what the others leave"
        )
    return sizes


def make_mesh(cfg: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """The mesh of a run. devices: all of them by default; those of a topology description to
    compile for machines that are not there.

    Raises: ConfigError as `mesh_sizes`.
    """
    devices = jax.devices() if devices is None else devices
    shape = tuple(mesh_sizes(cfg, len(devices)).values())
    grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


@functools.cache
def single_device_mesh() -> Mesh:
    """All axes of size 1: the default device."""
    return make_mesh(MeshConfig(), jax.local_devices()[:1])


def meshed(mesh: Mesh) -> Callable[[Callable], Callable]:
    """A decorator: while the function is traced, model code is cut by this mesh. A mesh of one
    device needs no cutting."""

    def decorate(function: Callable) -> Callable:
        if mesh.size == 1:
            return function

        @functools.wraps(function)
        def inside(*args, **kwargs):
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
                return function(*args, **kwargs)

        return inside

    return decorate


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh that model code runs under; 1 without one."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


# ---- specs ---------------------------------------------------------------------------------------


def partition_spec(
    axes: Sequence[str | None], shape: Sequence[int], sizes: dict[str, int]
) -> PartitionSpec:
    """The table, applied.

    axes: logical axes of an array; an array with one dimension more is stacked over layers.
    shape: decides how many of a logical axis' mesh axes divide it. sizes: devices an axis.
    """
    axes = ("layers",) * (len(shape) - len(axes)) + tuple(axes)
    used: set[str] = set()
    entries = []
    for axis, size in zip(axes, shape, strict=True):
        chosen: list[str] = []
        for name in RULES[axis] if axis else ():
            ways = math.prod(sizes[n] for n in chosen) * sizes[name]
            if name not in used and size % ways == 0:
                chosen.append(name)
        used.update(chosen)
        entries.append(tuple(chosen) or None)
    return PartitionSpec(*entries)


def shardings(tree: Any, mesh: Mesh | AbstractMesh) -> Any:
    """The same tree with a NamedSharding for each array or shape. An nnx.Variable goes by its
    logical axes, also inside an optimizer's state; everything else is on every device."""
    sizes = dict(mesh.shape)

    def of(node: Any) -> Any:
        axes = getattr(node, "logical_axes", None) if _is_variable(node) else None

        def place(leaf: Any) -> NamedSharding:
            declared = axes if axes is not None and leaf.ndim >= len(axes) else (None,) * leaf.ndim
            return NamedSharding(mesh, partition_spec(declared, leaf.shape, sizes))

        return jax.tree.map(place, node)

    return jax.tree.map(of, tree, is_leaf=_is_variable)


def _is_variable(node: Any) -> bool:
    return isinstance(node, nnx.Variable)


def replicated(mesh: Mesh) -> NamedSharding:
    """On every device."""
    return NamedSharding(mesh, PartitionSpec())


def in_host_memory(placed: Any) -> Any:
    """The same shardings, of arrays in the memory of their devices' hosts; scalars stay."""
    return jax.tree.map(lambda x: x.with_memory_kind("pinned_host") if len(x.spec) else x, placed)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Of [B, ...]: whole rows; the model cuts their positions."""
    return NamedSharding(mesh, PartitionSpec(RULES["batch"]))


def batch_ways(mesh: Mesh | AbstractMesh) -> int:
    """How many devices, or groups of them, have different rows."""
    return math.prod(mesh.shape[axis] for axis in RULES["batch"])


def local_rows(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Which of a step's rows, from 0 and in order, this process's devices hold."""
    held = batch_sharding(mesh).addressable_devices_indices_map((rows,))
    numbers = np.arange(rows)
    return tuple(sorted({int(row) for index in held.values() for row in numbers[index]}))


def place_batch(batch: Batch, mesh: Mesh, *, rows: int | None = None) -> Batch:
    """Rows on their devices. batch: this process's `local_rows` of `rows`; default: all rows, the
    same on every process."""
    sharding = batch_sharding(mesh)

    def place(x: Any) -> Array:
        shape = np.shape(x) if rows is None else (rows, *np.shape(x)[1:])
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), shape)

    return jax.tree.map(place, batch)


# ---- what is where -------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Placement:
    """An array on a mesh. bytes_per_device: of the part that each device holds."""

    name: str
    shape: tuple[int, ...]
    spec: PartitionSpec
    bytes_per_device: int

    @property
    def cuts(self) -> list[tuple[str, ...]]:
        """Mesh axes that cut each dimension."""
        return [(entry,) if isinstance(entry, str) else tuple(entry or ()) for entry in self.spec]


def placements(tree: Any, mesh: Mesh | AbstractMesh) -> list[Placement]:
    """Every array (or shape) of a tree, as `shardings` puts it, by path."""
    arrays = jax.tree_util.tree_leaves_with_path(tree)
    found = []
    for (path, leaf), sharding in zip(arrays, jax.tree.leaves(shardings(tree, mesh)), strict=True):
        part = math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        found.append(Placement(name, tuple(leaf.shape), sharding.spec, part))
    return found


def check_cut(found: Sequence[Placement], mesh: Mesh | AbstractMesh) -> None:
    """Raises: ConfigError that names an array of more than LARGE_BYTES that no axis cuts, though
    the mesh has axes that cut parameters."""
    if all(mesh.shape[axis] == 1 for axis in STORAGE_AXES):
        return
    for place in found:
        names = {name for axes in place.cuts for name in axes}
        if place.bytes_per_device > LARGE_BYTES and all(mesh.shape[n] == 1 for n in names):
            sizes = {axis: mesh.shape[axis] for axis in AXES if mesh.shape[axis] > 1}
            raise ConfigError(
                f"{place.name} {place.shape} would be whole on every device, "
                f"{place.bytes_per_device / 2**20:.0f} MiB: no axis of config.mesh {sizes} "
                "divides it; choose sizes that do"
            )


def format_placements(found: Sequence[Placement]) -> str:
    """A table: parameter, shape, spec, MiB a device; the sum at its end."""
    rows = [("parameter", "shape", "cut along", "MiB a device")]
    for place in found:
        cuts = ["·".join(axes) or "-" for axes in place.cuts]
        shape = "×".join(map(str, place.shape)) or "scalar"
        size = f"{place.bytes_per_device / 2**20:.2f}"
        rows.append((place.name, shape, ", ".join(cuts), size))
    total = sum(place.bytes_per_device for place in found)
    rows.append(("all", "", "", f"{total / 2**20:.2f}"))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def check_mesh(cfg: TrainConfig, model: ModelConfig, mesh: Mesh | AbstractMesh) -> None:
    """Raises: ConfigError for a mesh that does not divide the model's axes or the step's rows."""
    rows = cfg.data.rows_per_step // cfg.optimizer.accumulate
    divided = [
        ("model", "num_heads", model.num_heads),
        ("model", "num_kv_heads", model.num_kv_heads),
        ("model", "intermediate_size", model.intermediate_size),
        ("model", "moe_intermediate_size", model.moe_intermediate_size),
        ("model", "vocab_size", model.vocab_size),
        ("expert", "num_experts", model.num_experts),
    ]
    for axis, name, size in divided:
        if size % mesh.shape[axis]:
            raise ConfigError(
                f"config.mesh.{axis}={mesh.shape[axis]} does not divide the model's {name}={size}"
            )
    storage = math.prod(mesh.shape[axis] for axis in RULES["embed"])
    if mesh.shape["stage"] > 1 and model.hidden_size % storage:
        raise ConfigError(
            f"config.mesh: {' x '.join(RULES['embed'])} make {storage}, which must divide the "
            f"model's hidden_size={model.hidden_size} where config.mesh.stage is not 1"
        )
    pieces = 2 * mesh.shape["context"]
    if mesh.shape["context"] > 1 and cfg.data.row_length % pieces:
        raise ConfigError(
            f"config.data.row_length={cfg.data.row_length} does not divide into {pieces} pieces, "
            f"two for each device of config.mesh.context={mesh.shape['context']}"
        )
    if rows % batch_ways(mesh):
        raise ConfigError(
            f"config.data.rows_per_step={cfg.data.rows_per_step} / config.optimizer.accumulate="
            f"{cfg.optimizer.accumulate} makes micro-batches of {rows} rows, which do not divide "
            f"among the {batch_ways(mesh)} groups of devices that config.mesh gives rows to "
            f"({' x '.join(RULES['batch'])}): change one of them"
        )


# ---- inside the model ----------------------------------------------------------------------------


_NONE: frozenset[str] = frozenset()
_APART: contextvars.ContextVar[frozenset[str]] = contextvars.ContextVar("apart", default=_NONE)
_TRACKED: contextvars.ContextVar[bool] = contextvars.ContextVar("tracked", default=True)


@contextlib.contextmanager
def _setting(variable: contextvars.ContextVar, value: Any):
    token = variable.set(value)
    try:
        yield
    finally:
        variable.reset(token)


def apart(axis: str):
    """A context in which devices along a mesh axis are at different work: nothing is gathered or
    summed over it."""
    return _setting(_APART, _APART.get() | {axis})


def cut(*axes: str | None) -> PartitionSpec:
    """The spec of an activation with these logical axes, or of these leading ones."""
    return PartitionSpec(*(RULES[axis] if axis else None for axis in axes))


def _mesh() -> AbstractMesh:
    return jax.sharding.get_abstract_mesh()


def _by_compiler() -> bool:
    """Whether a mesh is set and XLA does the cutting."""
    return not _mesh().empty and not _mesh().are_all_axes_manual


def _by_hand() -> bool:
    """Whether this is a device's part, inside `on_shards`."""
    return not _mesh().empty and _mesh().are_all_axes_manual


def constrain(x: Array, *axes: str | None) -> Array:
    """x, cut along its logical axes."""
    return jax.lax.with_sharding_constraint(x, cut(*axes)) if _by_compiler() else x


def keep_stored(tree: Any) -> Any:
    """Parameters' gradients, cut as the parameters are stored, here and now: what uses them later
    would else have them summed whole, and kept so, and take its part itself."""
    if not _by_compiler():
        return tree

    def part(variable: nnx.Variable) -> nnx.Variable:
        def cut_now(x: Array) -> Array:
            x = jax.lax.with_sharding_constraint(x, _stored(variable, x.shape))
            return jax.lax.optimization_barrier(x)

        return jax.tree.map(cut_now, variable)

    return jax.tree.map(part, tree, is_leaf=_is_variable)


def gathered(param: nnx.Variable, dtype: Any) -> Array:
    """A parameter's values in `dtype`, ready for use: whole along "embed", which is cut to spread
    storage, not work. Its gradient is summed in `dtype` and cut again."""
    x, axes = param[...].astype(dtype), param.logical_axes
    if "embed" not in axes:
        return x
    if _by_compiler():
        used = [None if axis == "embed" else axis for axis in axes]
        specs = [partition_spec(names, x.shape, dict(_mesh().shape)) for names in (axes, used)]
        return _gather(x, *specs)
    names = cut_along(param, "embed")
    return jax.lax.all_gather(x, names, axis=axes.index("embed"), tiled=True) if names else x


def cut_along(param: nnx.Variable, axis: str) -> tuple[str, ...]:
    """The mesh axes that a parameter is cut along in a logical axis of its, inside `on_shards`."""
    if not _by_hand():
        return ()
    before = param.logical_axes[: param.logical_axes.index(axis)]
    taken = {name for other in before if other for name in RULES[other]}
    # What jax tracks varies along what it is cut along; `check_mesh` sees to the rest.
    varies = jax.typeof(param[...]).manual_axis_type.varying if _TRACKED.get() else set(AXES)
    return tuple(name for name in RULES[axis] if name in varies - taken - _APART.get())


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather(x: Array, stored: PartitionSpec, used: PartitionSpec) -> Array:
    return jax.lax.with_sharding_constraint(x, used)


_gather.defvjp(
    lambda x, stored, used: (_gather(x, stored, used), None),
    lambda stored, used, _, g: (jax.lax.with_sharding_constraint(g, stored),),
)


def on_shards(
    function: Callable[..., Any],
    params: Any,
    *arguments: Any,
    specs: Sequence[PartitionSpec],
    out_specs: Any,
    check_vma: bool = True,
) -> Any:
    """function(params, *arguments) on each device's part (jax.shard_map); without a mesh, on all.

    Args:
      params: a pytree of nnx.Variables, each cut as it is stored; `gathered` makes them whole.
      arguments: pytrees of arrays. specs: what cuts each one's leaves (see `cut`).
      out_specs: the same of the results. Sums over devices are the function's (`sum_over`).
      check_vma: False for kernels that jax cannot see into; then no result may be replicated.
    """
    if not _by_compiler():
        return function(params, *arguments)

    def inside(*args: Any) -> Any:
        with _setting(_TRACKED, check_vma):
            return function(*args)

    placed = jax.tree.map(
        lambda variable: jax.tree.map(lambda x: _stored(variable, x.shape), variable),
        params,
        is_leaf=_is_variable,
    )
    mapped = jax.shard_map(
        inside, in_specs=(placed, *specs), out_specs=out_specs, check_vma=check_vma
    )
    return mapped(params, *arguments)


def _stored(variable: nnx.Variable, shape: Sequence[int]) -> PartitionSpec:
    return partition_spec(variable.logical_axes, shape, dict(_mesh().shape))


def manual_axis(axis: str) -> str | None:
    """The mesh axis that a logical axis is cut along, inside `on_shards`; else None."""
    return RULES[axis][0] if _by_hand() else None


def whole(x: Array, axis: str, dimension: int) -> Array:
    """All of a logical axis along a dimension, inside `on_shards`; else x."""
    if not _by_hand():
        return x
    return jax.lax.all_gather(x, RULES[axis], axis=dimension, tiled=True)


def own(x: Array, axis: str, dimension: int) -> Array:
    """This device's part of a logical axis along a dimension, inside `on_shards`; else x. The
    inverse of `whole`."""
    for name in RULES[axis] if _by_hand() else ():
        size = x.shape[dimension] // axis_size(name)
        start = jax.lax.axis_index(name) * size
        x = jax.lax.dynamic_slice_in_dim(x, start, size, dimension)
    return x


def manual_index(axis: str) -> int | Array:
    """Which part of a logical axis this device has, inside `on_shards`; else 0."""
    return jax.lax.axis_index(RULES[axis]) if _by_hand() else 0


def sum_over(x: Array, *axes: str) -> Array:
    """The sum over the devices that logical axes are cut along, inside `on_shards`; else x."""
    names = tuple(n for axis in axes for n in RULES[axis] if n not in _APART.get())
    return jax.lax.psum(x, names) if _by_hand() else x
