"""Model checkpoints: one directory that holds all that a model needs.

::

    checkpoint/
      params/      the parameters, an Orbax PyTree checkpoint of a plain nested dict
      model/       JSON: format version, configs, special tokens, generation defaults, provenance
      tokenizer/   JSON: {file name: text}; may be empty

A training checkpoint adds `optimizer/` and `train/`; it is a model checkpoint all the same. The
JSON items are written as `ocp.args.JsonSave` writes them (a file `metadata` in the item's folder).

Parameters are read and written through TensorStore, chunk by chunk, so that conversion and merging
never hold a model in memory. What is written here restores with Orbax, and what Orbax saved is
read here. Orbax alone does not notice flipped bits: our own arrays carry a CRC32C a chunk, and a
training checkpoint an item `checksums` (see checksums.py), which every complete read verifies.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import itertools
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
import tensorstore as ts
from flax import nnx

from llada2_jax import checksums, typed
from llada2_jax.config import model_dict
from llada2_jax.folders import (
    CHECKSUMS,
    MODEL,
    PARAMS,
    TOKENIZER,
    TRAIN,
    CheckpointError,
    read_json,
    replacing,
    require_checkpoint,
)
from llada2_jax.types import ModelConfig, Params, SpecialTokens

FORMAT_VERSION = 1
CHUNK_BYTES = 64 << 20  # small enough to stream, large enough that mini is hundreds of files
CACHE_BYTES = 256 << 20  # decoded chunks kept while slices of them are read in order


@dataclasses.dataclass(frozen=True)
class ModelBundle:
    """A model with all that belongs to it.

    config: architecture. params: `nnx.State` as `model.build(config)[1]` has it, or None.
    special: ids with a meaning. tokenizer_files: {file name: text}. generation: defaults for the
    sampler (block_size, threshold, temperature, ...). hf_config: the Hugging Face config.json.
    hf_dtypes: {parameter path: dtype name} that an export writes. provenance: where it comes from.
    base: of adapters (config.lora), the model under them: path, param_dtype, checksums.
    """

    config: ModelConfig
    params: Params | None
    special: SpecialTokens
    tokenizer_files: dict[str, str] = dataclasses.field(default_factory=dict)
    generation: dict[str, Any] = dataclasses.field(default_factory=dict)
    hf_config: dict[str, Any] = dataclasses.field(default_factory=dict)
    hf_dtypes: dict[str, str] = dataclasses.field(default_factory=dict)
    provenance: dict[str, Any] = dataclasses.field(default_factory=dict)
    base: dict[str, Any] = dataclasses.field(default_factory=dict)

    def checksums(self) -> dict[str, int]:
        """Of the parts of the model, in whatever form its files are: what tells it from another."""
        leaves = jax.device_get(checksums.tree_checksums(flatten(self.params)))
        architecture = [model_dict(self.config), dataclasses.asdict(self.special)]
        return {
            "tokenizer": checksums.json_checksum(self.tokenizer_files),
            "architecture": checksums.json_checksum(architecture),
            "parameters": checksums.json_checksum({k: int(v) for k, v in leaves.items()}),
        }

    def tokenizer_json(self, where: str = "the checkpoint") -> str:
        """The text of its tokenizer.json. where: how an error calls it.

        Raises: CheckpointError if it has none.
        """
        if "tokenizer.json" not in self.tokenizer_files:
            raise CheckpointError(f"{where} has no tokenizer.json: put one beside its config")
        return self.tokenizer_files["tokenizer.json"]

    def model_item(self) -> dict[str, Any]:
        """The JSON of the item `model`."""
        config = dataclasses.asdict(self.config)
        if self.config.lora is None:
            del config["lora"]
        return {
            "format_version": FORMAT_VERSION,
            "config": config,
            "hf_config": self.hf_config,
            "special_tokens": dataclasses.asdict(self.special),
            "generation": self.generation,
            "hf_dtypes": self.hf_dtypes,
            "provenance": self.provenance,
        } | ({"base": self.base} if self.base else {})

    def tokenizer_item(self) -> dict[str, str]:
        """The JSON of the item `tokenizer`."""
        return dict(self.tokenizer_files)

    @classmethod
    def from_items(
        cls,
        model: Mapping[str, Any],
        tokenizer: Mapping[str, str],
        params: Params | None = None,
    ) -> ModelBundle:
        """The inverse of `model_item` and `tokenizer_item`.

        Raises: CheckpointError for another format version or a field that this version lacks.
        """
        version = model.get("format_version")
        if version != FORMAT_VERSION:
            raise CheckpointError(
                f"model item: format_version is {version!r}, this program reads {FORMAT_VERSION}; "
                "use the release that wrote it, or convert the checkpoint again"
            )
        build = functools.partial(typed.build, error=CheckpointError)
        return cls(
            config=build(ModelConfig, _mapping(model, "config"), "model item: config"),
            params=params,
            special=build(
                SpecialTokens, _mapping(model, "special_tokens"), "model item: special_tokens"
            ),
            tokenizer_files=dict(tokenizer),
            **{
                name: dict(_mapping(model, name, {}))
                for name in ("generation", "hf_config", "hf_dtypes", "provenance", "base")
            },
        )


def _mapping(
    item: Mapping[str, Any], field: str, default: Mapping[str, Any] | None = None
) -> Mapping[str, Any]:
    value = item.get(field, default)
    if not isinstance(value, Mapping):
        problem = "missing" if field not in item else f"{value!r}, not an object"
        raise CheckpointError(f"model item: the field {field!r} is {problem}; convert it again")
    return value


# ---- paths of parameters -------------------------------------------------------------------------


def flatten(tree: Any) -> dict[str, Any]:
    """{"moe_layers/mlp/experts/down": leaf}, from an nnx.State or a nested dict, sorted by path."""
    pure = nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree
    leaves: dict[str, Any] = {}

    def visit(node: Any, path: tuple[str, ...]) -> None:
        if not isinstance(node, Mapping):
            leaves["/".join(path)] = node
            return
        for key, child in node.items():
            visit(child, (*path, str(key)))

    visit(pure, ())
    return dict(sorted(leaves.items()))


def nest(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of `flatten`'s paths."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[name] = leaf
    return tree


def fill_params(abstract: Params, leaves: Mapping[str, Any]) -> Params:
    """`abstract` (from `model.build`) with its leaves replaced; casts to the dtypes it asks for.

    Raises: CheckpointError that names what is missing, extra or misshapen.
    """
    wanted = flatten(abstract)
    check_shapes({path: tuple(want.shape) for path, want in wanted.items()}, leaves)
    filled = {p: jax.numpy.asarray(leaves[p], want.dtype) for p, want in wanted.items()}
    state = jax.tree.map(lambda leaf: leaf, abstract)  # a copy: the caller's stays abstract
    nnx.replace_by_pure_dict(state, nest(filled))
    return state


def check_shapes(wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, Any]) -> None:
    """Raises CheckpointError unless `found` has these parameters, in these shapes."""
    check_same_names(set(wanted), set(found), "parameter")
    for path, shape in wanted.items():
        if tuple(found[path].shape) != shape:
            raise CheckpointError(
                f"parameter {path} has shape {tuple(found[path].shape)}, "
                f"the config asks for {shape}"
            )


def check_same_names(wanted: set[str], found: set[str], what: str) -> None:
    """Raises CheckpointError that lists what is missing and what is too many."""
    problems = []
    for label, names in (("missing", wanted - found), ("not expected", found - wanted)):
        if names:
            shown = ", ".join(sorted(names)[:5])
            more = f" and {len(names) - 5} more" if len(names) > 5 else ""
            problems.append(f"{label}: {shown}{more}")
    if problems:
        raise CheckpointError(f"{what}s do not fit the config; " + "; ".join(problems))


# ---- arrays on disk ------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and dtype of a parameter on disk."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def chunk_shape(
    spec: ArraySpec, limit: int | None = None, grain: Sequence[int] | None = None
) -> tuple[int, ...]:
    """Chunks of at most `limit` bytes (default: CHUNK_BYTES), or of one grain if that is larger.

    Leading axes are cut first, so that a chunk is a run of whole layers, or of whole experts of
    one layer, unless one of those is larger than the limit. grain: what chunks are multiples of on
    each axis, but at the end of it; default: one element.
    """
    limit = CHUNK_BYTES if limit is None else limit
    shape = tuple(max(1, size) for size in spec.shape)
    chunk = [min(pair) for pair in zip(grain or (1,) * len(shape), shape, strict=True)]
    for axis, size in reversed(list(enumerate(shape))):
        times = limit // (math.prod(chunk) * spec.dtype.itemsize)
        chunk[axis] = min(size, chunk[axis] * max(1, times))
        if chunk[axis] < size:
            break
    return tuple(chunk)


def boxes(shape: tuple[int, ...], chunk: tuple[int, ...]) -> Iterator[tuple[slice, ...]]:
    """The chunks of an array as slices, in order."""
    axes = [range(0, size, step) for size, step in zip(shape, chunk, strict=True)]
    for corner in itertools.product(*axes):
        yield tuple(
            slice(start, min(start + step, size))
            for start, step, size in zip(corner, chunk, shape, strict=True)
        )


Box = tuple[slice, ...]


class Source(Protocol):
    """Parameters in our layout, readable by slices."""

    specs: dict[str, ArraySpec]

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray: ...

    def boxes(self, path: str) -> list[Box]:
        """Slices that cover a parameter, each cheap to read as a whole."""
        ...


class ParamReader:
    """Parameters of a checkpoint, read slice by slice.

    Reads what ParamWriter wrote and what Orbax saved (OCDBT or not, zarr 2 or 3). A chunk that is
    absent or damaged is an error, never zeros.
    """

    def __init__(self, folder: Path, cache_bytes: int | None = None):
        self.folder = Path(folder).absolute()
        metadata = read_json(self.folder / "_METADATA")
        try:
            self._arrays = self._open(metadata, cache_bytes)
            self.specs = {
                path: ArraySpec(tuple(array.shape), np.dtype(array.dtype.numpy_dtype))
                for path, array in self._arrays.items()
            }
        except CheckpointError:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, SyntaxError, MemoryError) as error:
            raise CheckpointError(
                f"{self.folder}/_METADATA is not Orbax's, or damaged: {error!r}"
            ) from None

    def _open(self, metadata: Mapping[str, Any], cache_bytes: int | None) -> dict[str, Any]:
        folder = self.folder
        ocdbt = metadata.get("use_ocdbt", False)
        zarr = "zarr3" if metadata.get("use_zarr3", False) else "zarr"
        limit = CACHE_BYTES if cache_bytes is None else cache_bytes
        context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
        pending = {}
        for key in metadata["tree_metadata"]:
            path = ast.literal_eval(key)
            name = ".".join(path)
            file = {"driver": "file", "path": f"{folder}/"}
            if ocdbt:
                store = {"driver": "ocdbt", "base": file, "path": f"{name}/"}
            else:
                store = {"driver": "file", "path": f"{folder}/{name}/"}
            spec = {"driver": zarr, "kvstore": store, "fill_missing_data_reads": False}
            pending["/".join(path)] = ts.open(
                ts.Spec(spec), read=True, context=context, recheck_cached=False
            )
        return {path: _wait(pending[path], folder, path) for path in sorted(pending)}

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """A slice of a parameter. Raises CheckpointError that names it."""
        array = self._arrays[path]
        return _wait((array[index] if index else array).read(), self.folder, path)

    def boxes(self, path: str) -> list[Box]:
        """Whole chunks of the file, however it was cut, so that each is decoded once."""
        spec = self.specs[path]
        grain = self._arrays[path].chunk_layout.read_chunk.shape
        return list(boxes(spec.shape, chunk_shape(spec, grain=grain)))

    def read_all(self) -> dict[str, np.ndarray]:
        """All parameters, read at the same time and verified."""
        pending = {path: array.read() for path, array in self._arrays.items()}
        leaves = {path: _wait(future, self.folder, path) for path, future in pending.items()}
        if self.verifies:
            for path, leaf in leaves.items():
                self.verify(path, checksums.box_checksum(leaf, ()))
        return leaves

    @functools.cached_property
    def _checksums(self) -> dict[str, int]:
        return read_checksums(self.folder.parent)

    @property
    def verifies(self) -> bool:
        """Whether the checkpoint has checksums to compare with."""
        return bool(self._checksums)

    def verify(self, path: str, total: int) -> None:
        """Compares the sum of a parameter's `box_checksum`s with what was saved, if that is known.

        Raises: CheckpointError that names a damaged parameter.
        """
        if self.verifies and total % 2**32 != self._checksums.get(f"{PARAMS}/{path}"):
            raise CheckpointError(
                f"{self.folder}: parameter {path} is damaged: its checksum differs from the one "
                "taken when it was saved; use another checkpoint"
            )


class ParamWriter:
    """Writes parameters slice by slice into a directory that Orbax restores.

    One directory an array (zarr 3), one file a chunk, a checksum in each. `finish` writes Orbax's
    metadata: a directory without it is not a checkpoint.
    """

    def __init__(self, folder: Path, specs: Mapping[str, ArraySpec], like: Source | None = None):
        """like: what is going to be written box by box, so that no chunk should lie in two."""
        self.folder = folder = Path(folder).absolute()
        folder.mkdir(parents=True)
        self.specs = dict(specs)
        pending = {}
        for path, spec in specs.items():
            box = tuple(axis.stop for axis in like.boxes(path)[0]) if like else spec.shape
            chunk = chunk_shape(ArraySpec(box, spec.dtype))
            pending[path] = ts.open(_create(folder, path, spec, chunk))
        self._arrays = {path: _wait(pending[path], folder, path) for path in specs}

    def write(self, path: str, index: tuple[slice | int, ...], value: np.ndarray) -> None:
        """Writes a slice, and returns when it is on disk. Slices of whole chunks are fastest."""
        array = self._arrays[path]
        _wait((array[index] if index else array).write(value), self.folder, path)

    def finish(self) -> None:
        """Makes the directory an Orbax checkpoint."""
        tree = {}
        for path, spec in self.specs.items():
            keys = tuple(path.split("/"))
            tree[str(keys)] = {
                "key_metadata": [{"key": key, "key_type": 2} for key in keys],  # 2: a dict's key
                "value_metadata": {
                    "value_type": "np.ndarray",  # restores anywhere: names no devices
                    "skip_deserialize": False,
                    "write_shape": list(spec.shape),
                },
            }
        metadata = {
            "tree_metadata": tree,
            "use_ocdbt": False,
            "use_zarr3": True,
            "store_array_data_equal_to_fill_value": True,
            "custom_metadata": None,
        }
        (self.folder / "_METADATA").write_text(json.dumps(metadata))


def _create(folder: Path, path: str, spec: ArraySpec, chunk: tuple[int, ...]) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": list(chunk)}}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/{path.replace('/', '.')}/"},
        "create": True,
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": list(spec.shape),
            "data_type": spec.dtype.name,
            "chunk_grid": grid,
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }


def _wait(future: Any, folder: Path, path: str) -> Any:
    """The future's result; TensorStore's errors become ours, with the parameter's name."""
    try:
        return future.result()
    except (ValueError, OSError, RuntimeError) as error:
        text = str(error).split(" [")[0]
        raise CheckpointError(f"{folder}: parameter {path}: {text}") from error


# ---- whole checkpoints ---------------------------------------------------------------------------


def read_bundle(path: str | os.PathLike[str]) -> ModelBundle:
    """All of a checkpoint of ours but its parameters. Raises: CheckpointError for a damaged item,
    where the checkpoint has checksums."""
    path = require_checkpoint(Path(path))
    has_tokenizer = (path / TOKENIZER / "metadata").is_file()
    model, tokenizer = read_item(path, MODEL), read_item(path, TOKENIZER) if has_tokenizer else {}
    _check_items(path, {MODEL: model, TOKENIZER: tokenizer})
    return ModelBundle.from_items(model, tokenizer)


def read_train_item(path: Path) -> dict[str, Any]:
    """The item `train` of a training checkpoint. Raises: CheckpointError where there is none, or a
    damaged one, where the checkpoint has checksums."""
    item = read_item(path, TRAIN)
    _check_items(path, {TRAIN: item})
    return item


def _check_items(path: Path, items: Mapping[str, Any]) -> None:
    wanted = read_checksums(path)
    for name, item in items.items():
        if wanted and wanted.get(name) != checksums.json_checksum(item):
            raise CheckpointError(
                f"{path}: the item {name} is damaged: its checksum differs from the one taken when "
                "it was saved; use another checkpoint"
            )


def read_item(path: Path, name: str) -> dict[str, Any]:
    """A JSON item of a checkpoint. Raises CheckpointError where it is absent or no JSON object."""
    return read_json(Path(path) / name / "metadata")


def read_checksums(path: Path) -> dict[str, int]:
    """The checksums of a checkpoint by item and leaf; {} where it was saved without.

    Raises: CheckpointError where they are damaged themselves.
    """
    if not (Path(path) / CHECKSUMS).exists():
        return {}
    try:
        return checksums.unseal(read_item(path, CHECKSUMS))
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def write_items(folder: Path, bundle: ModelBundle) -> None:
    """The items `model` and `tokenizer`."""
    for name, item in ((MODEL, bundle.model_item()), (TOKENIZER, bundle.tokenizer_item())):
        (folder / name).mkdir(parents=True)
        (folder / name / "metadata").write_text(json.dumps(item, indent=1))


def save_model(
    path: str | os.PathLike[str], bundle: ModelBundle, *, overwrite: bool = False
) -> None:
    """Writes a model checkpoint; it is there whole or not at all.

    Raises: CheckpointError where `path` exists (unless `overwrite`) or there are no parameters.
    """
    if bundle.params is None:
        raise CheckpointError("save_model: the bundle has no params")
    leaves = flatten(bundle.params)
    specs = {p: ArraySpec(tuple(a.shape), np.dtype(a.dtype)) for p, a in leaves.items()}
    with replacing(path, overwrite=overwrite) as folder:
        writer = ParamWriter(folder / PARAMS, specs)
        for name, leaf in leaves.items():
            writer.write(name, (), np.asarray(leaf))
        writer.finish()
        write_items(folder, bundle)
