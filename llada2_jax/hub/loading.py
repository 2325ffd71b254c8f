"""A model from a directory, be it a checkpoint of ours, adapters, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from llada2_jax import checkpoint, folders, typed
from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.folders import HF_CONFIG, HF_GENERATION, is_hf_folder, read_json
from llada2_jax.hub.adapted import AdaptedSource, merged_description
from llada2_jax.hub.config import config_from_hf, special_tokens
from llada2_jax.hub.huggingface import HFModel, read_tokenizer_files
from llada2_jax.hub.placing import read_placed
from llada2_jax.model import build
from llada2_jax.model_check import check_model
from llada2_jax.types import ModelConfig


def load_model(
    path: str | os.PathLike[str],
    *,
    mask_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    mesh: Mesh | None = None,
    **config_overrides: Any,
) -> ModelBundle:
    """A model from a directory: a checkpoint of ours, a training step, or a Hugging Face folder.

    Args:
      path: the directory.
      mask_id, eos_id, pad_id: for Hugging Face folders whose files do not say (see
        `hub.config.special_tokens`); a checkpoint of ours has its ids.
      mesh: put each part of the parameters on the devices that hold it (see sharding.py), instead
        of all of them on the default device.
      config_overrides: fields of ModelConfig, e.g. dtype="float32", param_dtype="float32".

    A checkpoint that holds adapters gives the merged model.

    Returns: a bundle whose params fit `merge_params(bundle.config, bundle.params)`, cast to the
      config's param_dtype.
    Raises: CheckpointError that names the file, field or tensor.
    """
    path = Path(path)
    bundle = load_bundle(path, mask_id=mask_id, eos_id=eos_id, pad_id=pad_id)
    config = _override(dataclasses.replace(bundle.config, lora=None), config_overrides)
    source = open_source(path, bundle)
    bundle = dataclasses.replace(merged_description(bundle), config=config)
    abstract = build(config)[1]
    flat = checkpoint.flatten(abstract)
    if mesh is not None:
        leaves = read_placed(source, abstract, mesh)
    elif isinstance(source, HFModel):
        leaves = source.read_all(lambda name: np.dtype(flat[name].dtype))
    else:
        leaves = source.read_all()
    return dataclasses.replace(bundle, params=checkpoint.fill_params(abstract, leaves))


def open_source(
    path: str | os.PathLike[str], bundle: ModelBundle
) -> HFModel | checkpoint.ParamReader | AdaptedSource:
    """The parameters of a model in any form; of adapters, those of the merged model.

    bundle: from `load_bundle`. Raises: CheckpointError that names what does not fit the config.
    """
    path = Path(path)
    if bundle.config.lora is not None:
        factors = checkpoint.ParamReader(path / folders.PARAMS).read_all()
        base = Path(bundle.base["path"])
        under = load_bundle(base, mask_id=bundle.special.mask)
        return AdaptedSource(open_source(base, under), bundle, factors)
    shapes = param_shapes(bundle.config)
    if is_hf_folder(path):
        return HFModel(path, bundle.hf_config, shapes)
    source = checkpoint.ParamReader(path / folders.PARAMS)
    checkpoint.check_shapes(shapes, source.specs)
    return source


def load_bundle(
    path: str | os.PathLike[str],
    *,
    mask_id: int | None = None,
    eos_id: int | None = None,
    pad_id: int | None = None,
    tokenizer_files: dict[str, str] | None = None,
) -> ModelBundle:
    """What `load_model` gives, without reading the parameters.

    tokenizer_files: instead of those in a Hugging Face folder.
    """
    path = Path(path)
    if not is_hf_folder(path):
        if tokenizer_files is not None:
            raise CheckpointError(f"{path}: a checkpoint has its tokenizer; it cannot be replaced")
        return _own_bundle(path, mask_id=mask_id, eos_id=eos_id, pad_id=pad_id)
    hf = read_json(path / HF_CONFIG)
    config = config_from_hf(hf)
    if tokenizer_files is None:
        tokenizer_files = read_tokenizer_files(path)
    special = special_tokens(hf, tokenizer_files, mask_id=mask_id, eos_id=eos_id, pad_id=pad_id)
    generation = path / HF_GENERATION
    return ModelBundle(
        config=config,
        params=None,
        special=special,
        tokenizer_files=tokenizer_files,
        generation=read_json(generation) if generation.is_file() else {},
        hf_config=hf,
        provenance={"source": path.resolve().name, "model_type": hf["model_type"]},
    )


def _own_bundle(path: Path, **ids: int | None) -> ModelBundle:
    bundle = checkpoint.read_bundle(path)
    for name, value in ids.items():
        own = getattr(bundle.special, name.removesuffix("_id"))
        if value is not None and value != own:
            raise CheckpointError(f"{path}: {name}={value}, but the checkpoint says {own}")
    return bundle


def _override(config: ModelConfig, overrides: dict[str, Any]) -> ModelConfig:
    values = {name: getattr(config, name) for name in typed.names(ModelConfig)} | overrides
    config = typed.build(ModelConfig, values, "load_model: config", CheckpointError)
    check_model(config, "load_model: config.", CheckpointError)
    return config


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{path: shape} of all parameters of an architecture."""
    return {path: tuple(a.shape) for path, a in checkpoint.flatten(build(config)[1]).items()}
