"""Checkpoints that hold adapters, read as the merged model."""

from __future__ import annotations

import dataclasses

import numpy as np

from llada2_jax.adapters import merged_slice
from llada2_jax.checkpoint import ArraySpec, CheckpointError, ModelBundle, Source
from llada2_jax.checksums import box_checksum, json_checksum


class AdaptedSource:
    """A base model's parameters, in the dtype they were trained under, with what adapters add to
    them: a checkpoint.Source.

    base: the model's parameters. bundle: of the checkpoint with the adapters. factors: its
    parameters. Raises: CheckpointError where the base is not the one that they were trained on.
    """

    verifies = False  # its parts were, when they were read

    def __init__(self, base: Source, bundle: ModelBundle, factors: dict[str, np.ndarray]):
        assert bundle.config.lora is not None
        dtype = np.dtype(bundle.base["param_dtype"])
        self.specs = {path: ArraySpec(spec.shape, dtype) for path, spec in base.specs.items()}
        self.boxes = base.boxes
        self._base, self._factors, self._scale = base, factors, bundle.config.lora.scale
        sums = {path: self._checksum(path) for path in sorted(self.specs)}
        if bundle.base["checksums"]["parameters"] != json_checksum(sums):
            raise CheckpointError(
                f"the adapters were trained on {bundle.base['path']}, whose parameters have "
                "changed since: put the model back that they were trained on"
            )

    def _checksum(self, path: str) -> int:
        return (
            sum(box_checksum(self._read_base(path, box), box) for box in self.boxes(path)) % 2**32
        )

    def _read_base(self, path: str, index: tuple[slice | int, ...]) -> np.ndarray:
        return self._base.read(path, index).astype(self.specs[path].dtype)

    def read(self, path: str, index: tuple[slice | int, ...] = ()) -> np.ndarray:
        """A slice of a merged parameter."""
        values = self._read_base(path, index)
        rest = (slice(None),) * (len(self.specs[path].shape) - len(index))
        slices = tuple(slice(i, i + 1) if isinstance(i, int) else i for i in index) + rest
        return np.asarray(merged_slice(path, values, slices, self._factors, self._scale))

    def read_all(self) -> dict[str, np.ndarray]:
        """All merged parameters."""
        return {path: self.read(path) for path in self.specs}


def merged_description(bundle: ModelBundle) -> ModelBundle:
    """What describes the merged model of a checkpoint with adapters; other bundles as they are."""
    config = dataclasses.replace(bundle.config, lora=None)
    return dataclasses.replace(bundle, config=config, base={})
