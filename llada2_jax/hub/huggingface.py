"""A Hugging Face folder as a model: config.json, *.safetensors, tokenizer files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from llada2_jax.checkpoint import (
    ArraySpec,
    Box,
    CheckpointError,
    boxes,
    check_same_names,
    chunk_shape,
)
from llada2_jax.folders import TOKENIZER_FILES
from llada2_jax.hub import names
from llada2_jax.hub.config import config_from_hf, mtp_layers
from llada2_jax.hub.safetensors_files import TensorFolder
from llada2_jax.types import ModelConfig


def read_tokenizer_files(folder: Path) -> dict[str, str]:
    """{file name: text} of those files that are there, line ends as they are."""
    files = {}
    for path in (folder / name for name in TOKENIZER_FILES):
        try:
            files[path.name] = path.read_bytes().decode()
        except FileNotFoundError:
            continue
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{path} is not UTF-8: {error}") from None
    return files


class HFModel:
    """The parameters of a Hugging Face folder in our layout, read slice by slice.

    specs: shape and dtype of each parameter, as stored. dropped: names of MTP tensors.
    Raises: CheckpointError that names tensors which are missing, extra, misshapen, truncated or
    of a dtype that weights do not have.
    """

    def __init__(self, folder: Path, hf_config: dict[str, Any], shapes: dict[str, tuple[int, ...]]):
        self.folder = Path(folder)
        self.cfg: ModelConfig = config_from_hf(hf_config)
        self.tensors = TensorFolder(self.folder)
        self.dropped = names.mtp_names(self.tensors.names, self.cfg, mtp_layers(hf_config))
        merged = names.is_merged(self.tensors.names)
        self._slices = {
            rule.path: {part.index: part for part in names.slices(self.cfg, rule, merged=merged)}
            for rule in names.rules(self.cfg)
        }
        check_same_names(set(shapes), set(self._slices), "parameter")  # the table and the model
        self._check()
        self.specs = {
            path: ArraySpec(tuple(shape), self._dtype(path)) for path, shape in shapes.items()
        }

    def _check(self) -> None:
        wanted = {
            s.name for parts in self._slices.values() for p in parts.values() for s in p.sources
        }
        check_same_names(wanted, self.tensors.names - self.dropped, "tensor")
        for parts in self._slices.values():
            for part in parts.values():
                for source in part.sources:
                    self._check_shape(source, part.shape)

    def _check_shape(self, source: names.Source, shape: tuple[int, ...]) -> None:
        if source.lead is not None:
            shape = (self.cfg.num_experts, *shape)
        found = self.tensors.shape(source.name)
        if found != shape:
            raise CheckpointError(
                f"tensor {source.name} has shape {found}, config.json asks for {shape}"
            )

    def _dtype(self, path: str) -> np.dtype:
        dtypes: dict[np.dtype, str] = {}
        for part in self._slices[path].values():
            for source in part.sources:
                dtypes.setdefault(self.tensors.dtype(source.name), source.name)
        if len(dtypes) > 1:
            shown = ", ".join(f"{name} is {dtype}" for dtype, name in dtypes.items())
            raise CheckpointError(f"tensors that share one array differ in dtype: {shown}")
        return next(iter(dtypes))

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """parameter[index] for slices of stacking axes (layers, experts); the others stay whole."""
        depth = self.depth(path)
        if not all(isinstance(s, slice) for s in index) or len(index) < depth:
            raise ValueError(f"{path}: index {index} does not slice {depth} stacking axes")
        shape = self.specs[path].shape
        box = tuple(s for s in index[:depth] if isinstance(s, slice))
        out = np.empty([*(s.stop - s.start for s in box), *shape[depth:]], self.specs[path].dtype)
        for offset in np.ndindex(*out.shape[:depth]):
            place = tuple(int(o) + s.start for o, s in zip(offset, box, strict=True))
            out[offset] = self._read_slice(path, place, shape[depth:])
        return out

    def depth(self, path: str) -> int:
        """How many leading axes stack what is one tensor each in the files."""
        return len(next(iter(self._slices[path])))

    def _read_slice(self, path: str, index: tuple[int, ...], shape: tuple[int, ...]) -> np.ndarray:
        part = self._slices[path][index]
        tensors = [self.tensors.read(source.name, source.lead) for source in part.sources]
        return part.to_ours(tensors, shape)

    def boxes(self, path: str) -> list[Box]:
        """Boxes for `read`: chunks of the array on disk, but never a part of a tensor."""
        spec, depth = self.specs[path], self.depth(path)
        chunk = chunk_shape(spec)[:depth] + spec.shape[depth:]
        return list(boxes(spec.shape, chunk))

    def read_all(self, cast: Callable[[str], np.dtype]) -> dict[str, np.ndarray]:
        """All parameters, each in the dtype that `cast` names."""
        out = {}
        for path, spec in self.specs.items():
            out[path] = np.empty(spec.shape, cast(path))
            for box in self.boxes(path):
                out[path][box] = self.read(path, box).astype(cast(path))
        return out
