"""Conversion between the formats, a slice at a time: memory holds one tensor, never a model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from llada2_jax import checkpoint, folders, progress
from llada2_jax.checkpoint import (
    ArraySpec,
    CheckpointError,
    ModelBundle,
    ParamWriter,
    Source,
)
from llada2_jax.folders import HF_CONFIG, HF_GENERATION, is_hf_folder
from llada2_jax.hub import config as hub_config
from llada2_jax.hub import load_bundle, names, open_source
from llada2_jax.hub.adapted import merged_description
from llada2_jax.hub.huggingface import HFModel, read_tokenizer_files
from llada2_jax.hub.safetensors_files import DTYPES, TensorFolderWriter
from llada2_jax.mask_embedding import mask_row

SHARD_BYTES = 5_000_000_000
_EMBEDDING = "embedding"
_BIAS = "moe_layers/mlp/router/expert_bias"


@dataclasses.dataclass(frozen=True)
class Options:
    """What a conversion may change.

    to: "orbax" or "hf"; None: the other format than the source's.
    dtype: of the weights written; None: Orbax keeps the source's, Hugging Face gets the dtypes
      that the model had there (as stored where that is unknown). The router's bias keeps its own.
    mask_id, eos_id, pad_id: see hub.config.special_tokens. tokenizer: a folder whose tokenizer
      files replace the source's. mask_init: the mask row of an AR model's embedding. seed: of
      mask_init="random". model_type: of the config.json written; None: the source's.
    """

    to: str | None = None
    dtype: str | None = None
    mask_id: int | None = None
    eos_id: int | None = None
    pad_id: int | None = None
    tokenizer: Path | None = None
    mask_init: str = "keep"
    seed: int = 0
    model_type: str | None = None
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False


def convert(source: Path, target: Path, options: Options | None = None) -> dict[str, Any]:
    """Converts a model directory. `target` is there whole at the end, or not at all.

    Returns: the report (JSON): formats, dropped tensors, special tokens, what became of the mask.
    Raises: CheckpointError that names the tensor, field or file.
    """
    source, target, options = Path(source), Path(target), options or Options()
    bundle = _bundle(source, options)
    to = options.to or ("orbax" if is_hf_folder(source) else "hf")
    params = open_source(source, bundle)
    bundle = merged_description(bundle)
    wanted = dict.fromkeys(params.specs, options.dtype)
    if options.dtype is None and to == "hf":
        wanted = {path: bundle.hf_dtypes.get(path) for path in params.specs}
    dtypes = {path: _target_dtype(params, path, wanted[path]) for path in params.specs}
    mask = _MaskRow(bundle, params, options)
    report = {
        "source": source.resolve().name,
        "to": to,
        "model_type": bundle.hf_config.get("model_type"),
        "special_tokens": dataclasses.asdict(bundle.special),
        "mask": mask.report,
        "dropped_tensors": sorted(params.dropped) if isinstance(params, HFModel) else [],
        "dtypes": sorted({dtype.name for dtype in dtypes.values()}),
    }
    with folders.replacing(target, overwrite=options.overwrite) as folder:
        if to == "orbax":
            provenance = {**bundle.provenance, "conversion": report}
            hf_dtypes = bundle.hf_dtypes or {p: s.dtype.name for p, s in params.specs.items()}
            bundle = dataclasses.replace(bundle, provenance=provenance, hf_dtypes=hf_dtypes)
            _write_orbax(folder, params, bundle, dtypes, mask)
        else:
            _write_hf(folder, params, bundle, dtypes, mask, options)
    return report


def _bundle(source: Path, options: Options) -> ModelBundle:
    tokenizer = options.tokenizer
    if tokenizer is None:
        return load_bundle(
            source, mask_id=options.mask_id, eos_id=options.eos_id, pad_id=options.pad_id
        )
    files = read_tokenizer_files(tokenizer)
    if "tokenizer.json" not in files:
        raise CheckpointError(f"{tokenizer}: no tokenizer.json")
    return load_bundle(
        source,
        mask_id=options.mask_id,
        eos_id=options.eos_id,
        pad_id=options.pad_id,
        tokenizer_files=files,
    )


def _target_dtype(params: Source, path: str, wanted: str | None) -> np.dtype:
    stored = params.specs[path].dtype
    if wanted is None or path == _BIAS:
        return stored
    dtype = np.dtype(jnp.dtype(wanted))
    if dtype not in DTYPES.values():
        raise CheckpointError(f"dtype {wanted}: weights are float32, bfloat16 or float16")
    return dtype


def _cast(value: np.ndarray, dtype: np.dtype, path: str) -> np.ndarray:
    """Raises CheckpointError where a finite weight would become infinite (float16's range)."""
    if value.dtype == dtype:
        return value
    with np.errstate(over="ignore"):
        cast = value.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all() and np.isfinite(value).all():
        raise CheckpointError(f"parameter {path} exceeds the range of float16; use bfloat16")
    return cast


def _bar(specs: Mapping[str, ArraySpec]) -> tqdm:
    return progress.bar(what="writing", total=sum(s.nbytes for s in specs.values()), unit="B")


def _write_orbax(
    folder: Path,
    params: Source,
    bundle: ModelBundle,
    dtypes: Mapping[str, np.dtype],
    mask: _MaskRow,
) -> None:
    specs = {path: ArraySpec(spec.shape, dtypes[path]) for path, spec in params.specs.items()}
    writer = ParamWriter(folder / folders.PARAMS, specs, like=params)
    with _bar(specs) as bar:
        for path in specs:
            for box in params.boxes(path):
                value = mask.apply(path, params.read(path, box), box)
                writer.write(path, box, _cast(value, dtypes[path], path))
                bar.update(value.size * dtypes[path].itemsize)
    writer.finish()
    checkpoint.write_items(folder, bundle)


def _write_hf(
    folder: Path,
    params: Source,
    bundle: ModelBundle,
    dtypes: Mapping[str, np.dtype],
    mask: _MaskRow,
    options: Options,
) -> None:
    order = names.hf_order(bundle.config)
    specs = {
        source.name: ArraySpec(part.shape, dtypes[part.path])
        for part in order
        for source in part.sources
    }
    writer = TensorFolderWriter(folder, specs, options.shard_bytes)
    try:
        with _bar(specs) as bar:
            for name, value in _hf_tensors(order, params, mask):
                value = _cast(value, specs[name].dtype, name)
                writer.write(name, value)
                bar.update(value.nbytes)
    finally:
        writer.close()
    writer.finish()
    _write_hf_files(folder, bundle, options, dtypes[_EMBEDDING])


def _hf_tensors(
    order: list[names.Slice], params: Source, mask: _MaskRow
) -> Iterator[tuple[str, np.ndarray]]:
    for part in order:
        index = tuple(slice(i, i + 1) for i in part.index)
        value = params.read(part.path, index)
        value = mask.apply(part.path, value, index).reshape(value.shape[len(index) :])
        for source, tensor in zip(part.sources, part.to_hf(value), strict=True):
            yield source.name, tensor


def _write_hf_files(folder: Path, bundle: ModelBundle, options: Options, dtype: np.dtype) -> None:
    model_type = options.model_type or bundle.hf_config.get("model_type") or "llada2_moe"
    if model_type == "llada2_moe_veomni":
        model_type = "llada2_moe"  # dFactory's name goes with its layout; the released one is here
    special = bundle.special
    config = hub_config.config_to_hf(
        bundle.config, special, model_type=model_type, dtype=dtype.name, base=bundle.hf_config
    )
    generation = {"eos_token_id": special.eos, "pad_token_id": special.pad, **bundle.generation}
    files = {
        HF_CONFIG: json.dumps(config, indent=2) + "\n",
        HF_GENERATION: json.dumps(generation, indent=2) + "\n",
        **bundle.tokenizer_files,
    }
    for name, text in files.items():
        (folder / name).write_text(text, newline="")


# ---- the mask's row of the embedding -------------------------------------------------------------


class _MaskRow:
    """Initialises the mask's embedding of an AR model, where nothing has trained it to be a mask.

    report: JSON: the id, what it meant before, and the row's norm before and after.
    """

    def __init__(self, bundle: ModelBundle, params: Source, options: Options):
        self._id, self._row = bundle.special.mask, None
        self.report: dict[str, Any] = {"id": self._id, "init": options.mask_init}
        if bundle.hf_config.get("model_type") == hub_config.AR_MODEL_TYPE:
            text = hub_config.TokenizerInfo(bundle.tokenizer_files).text(self._id)
            self.report["meant_before"] = text
            self._initialise(params, options)
        elif options.mask_init != "keep":
            raise CheckpointError(
                f"mask_init={options.mask_init!r} is for AR models ({hub_config.AR_MODEL_TYPE}): "
                "this model's mask has been trained to be one"
            )

    def _initialise(self, params: Source, options: Options) -> None:
        whole = tuple(slice(0, size) for size in params.specs[_EMBEDDING].shape)
        embedding = params.read(_EMBEDDING, whole)
        self._row = mask_row(embedding, self._id, options.mask_init, seed=options.seed)
        norms = np.linalg.norm(embedding.astype(np.float32), axis=1)
        self.report |= {
            "norm_before": float(norms[self._id]),
            "norm_after": float(np.linalg.norm(self._row.astype(np.float32))),
            "median_norm_of_all_rows": float(np.median(norms)),
        }

    def apply(self, path: str, value: np.ndarray, box: tuple[slice, ...]) -> np.ndarray:
        """`value`, the box of a parameter, with the new row where it holds the mask's."""
        start = box[0].start if box else 0
        if path != _EMBEDDING or self._row is None or not 0 <= self._id - start < len(value):
            return value
        value = np.array(value)
        value[self._id - start] = self._row
        return value
