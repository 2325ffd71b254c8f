"""The model a run starts from: a checkpoint made ready for training, or fresh parameters."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import ConfigError, TrainConfig, model_dict
from llada2_jax.config_check import configured_model
from llada2_jax.decoding_rules import THRESHOLD
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.hub.config import config_to_hf, special_tokens
from llada2_jax.hub.huggingface import read_tokenizer_files
from llada2_jax.mask_embedding import mask_row
from llada2_jax.model import build, init_params
from llada2_jax.sharding import check_cut, check_mesh, placements
from llada2_jax.types import ModelConfig


def starting_bundle(cfg: TrainConfig, mesh: Mesh | None = None) -> ModelBundle:
    """The model a run starts from: a checkpoint, or fresh parameters of config.model.

    mesh: what to cut the parameters by. provenance["checksums"] of a checkpoint tell it from
    another one that is put in its place.
    Raises: CheckpointError or ConfigError that names what does not fit.
    """
    runtime = dataclasses.asdict(cfg.runtime)
    if cfg.init.checkpoint:
        mask_id = _given(cfg.init.mask_id)
        found = load_bundle(cfg.init.checkpoint, mask_id=mask_id).config
        _check_architecture(cfg, found)
        _check_model(cfg, dataclasses.replace(found, **runtime), mesh)
        bundle = load_model(cfg.init.checkpoint, mask_id=mask_id, mesh=mesh, **runtime)
        provenance = bundle.provenance | {"checksums": bundle.checksums()}
        bundle = dataclasses.replace(bundle, provenance=provenance)
        return _describe(_initialise_mask(bundle, cfg), cfg)
    model = configured_model(cfg)
    _check_model(cfg, model, mesh)
    files = read_tokenizer_files(Path(cfg.data.tokenizer))
    if "tokenizer.json" not in files:
        raise ConfigError(f"config.data.tokenizer={cfg.data.tokenizer!r} holds no tokenizer.json")
    special = special_tokens({"vocab_size": model.vocab_size}, files)
    hf_config = config_to_hf(model, special, model_type="bailing_moe_v2")
    params = init_params(model, cfg.seed, mesh)
    return ModelBundle(model, params, special, tokenizer_files=files, hf_config=hf_config)


def _given(mask_id: int) -> int | None:
    return mask_id if mask_id >= 0 else None


def _check_architecture(cfg: TrainConfig, found: ModelConfig) -> None:
    """Raises: ConfigError where the checkpoint is not of config.init.architecture."""
    if not cfg.init.architecture:
        return
    wanted = dataclasses.replace(
        ARCHITECTURES[cfg.init.architecture],
        max_position_embeddings=found.max_position_embeddings,
        rope_scaling=found.rope_scaling,
        initializer_range=found.initializer_range,
        **dataclasses.asdict(cfg.runtime),
    )
    for name, value in model_dict(wanted).items():
        if model_dict(found)[name] != value:
            raise ConfigError(
                f"config.init.checkpoint={cfg.init.checkpoint!r} has {name}="
                f"{model_dict(found)[name]!r}; config.init.architecture="
                f"{cfg.init.architecture!r} has {value!r}: the checkpoint or the name is wrong"
            )


def _check_model(cfg: TrainConfig, model: ModelConfig, mesh: Mesh | None) -> None:
    """What the config and the mesh ask of a model, before its parameters are read."""
    row, limit = cfg.data.row_length, model.max_position_embeddings
    if row > limit:
        raise ConfigError(
            f"config.data.row_length={row} is beyond the model's max_position_embeddings={limit}"
        )
    if mesh is not None:
        check_mesh(cfg, model, mesh)
        check_cut(placements(build(model)[1], mesh), mesh)


def _describe(bundle: ModelBundle, cfg: TrainConfig) -> ModelBundle:
    """A run that ends in block diffusion makes an LLaDA2 of its parent, and says how to decode."""
    last = cfg.phases[-1]
    if last.objective == "ar":
        return bundle
    hf_config = config_to_hf(
        bundle.config, bundle.special, model_type="llada2_moe", base=bundle.hf_config
    )
    decode = {"block_size": last.block_size, "threshold": THRESHOLD}
    decode["add_bos"] = bundle.special.bos is not None
    generation = bundle.generation | decode
    return dataclasses.replace(bundle, hf_config=hf_config, generation=generation)


def _initialise_mask(bundle: ModelBundle, cfg: TrainConfig) -> ModelBundle:
    if cfg.init.mask_embedding == "keep":
        return bundle
    params = jax.tree.map(lambda x: x, bundle.params)
    embedding = params["embedding"]
    table, mask = embedding[...], bundle.special.mask
    host = multihost_utils.process_allgather(table, tiled=True)
    row = mask_row(np.asarray(host), mask, cfg.init.mask_embedding, seed=cfg.seed)
    put = jax.jit(lambda table, row: table.at[mask].set(row), out_shardings=table.sharding)
    embedding[...] = put(table, row)
    return dataclasses.replace(bundle, params=params)


def with_learning_rate(cfg: TrainConfig) -> TrainConfig:
    """The config with the learning rate that the starting checkpoint was left at, if it asks so."""
    if not cfg.optimizer.learning_rate_from_start:
        return cfg
    origin = load_bundle(cfg.init.checkpoint, mask_id=_given(cfg.init.mask_id)).provenance
    newest = max(origin.get("merged", [origin]), key=lambda source: source.get("step", 0))
    rate = newest.get("learning_rate")
    if not isinstance(rate, float) or not rate > 0:
        raise ConfigError(
            "config.optimizer.learning_rate_from_start: config.init.checkpoint="
            f"{cfg.init.checkpoint!r} does not tell the learning rate it was left at (steps of "
            "a run and their averages do): set learning_rate instead"
        )
    optimizer = dataclasses.replace(cfg.optimizer, learning_rate=rate)
    return dataclasses.replace(cfg, optimizer=optimizer)
