"""The frozen model that a policy is compared with, and its bounds on the texts of a run."""

from __future__ import annotations

import dataclasses
import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float

from llada2_jax import progress
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import ConfigError, TrainConfig
from llada2_jax.data.best_fit import BestFitRows
from llada2_jax.data.corpus import Corpus
from llada2_jax.data.loader import to_batch
from llada2_jax.data.prepare import tokenizer_hash
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.model import merge_params
from llada2_jax.objectives import Context
from llada2_jax.objectives.dpo import bound_shares
from llada2_jax.sharding import batch_sharding, constrain, meshed, place_batch, replicated
from llada2_jax.types import Batch, ModelConfig, Params

ReferenceStep = Callable[[Params, Batch, Context], Float[Array, "B L"]]


def load_reference(cfg: TrainConfig, start: ModelBundle, mesh: Mesh | None = None) -> ModelBundle:
    """The model at config.reference.checkpoint; where that is empty, the one the run starts from.

    It may be of any size, but not of another vocabulary. mesh: what to cut its parameters by.
    Raises: ConfigError that names what differs; CheckpointError.
    """
    path = cfg.reference.checkpoint
    if not path:
        return start
    mask_id = cfg.reference.mask_id if cfg.reference.mask_id >= 0 else None
    found = load_bundle(path, mask_id=mask_id)
    named = f"config.reference.checkpoint={path!r}"
    origin = f"config.init.checkpoint={cfg.init.checkpoint!r}"
    for what, ours, its in (
        ("tokens", start.config.vocab_size, found.config.vocab_size),
        ("special tokens", start.special, found.special),
        ("tokenizer's sha256", _tokenizer(start, origin), _tokenizer(found, named)),
    ):
        if ours != its:
            raise ConfigError(
                f"{named} has another vocabulary than {origin}: its {what}: {its}, not {ours}; "
                "likelihoods compare only over the same ids"
            )
    return load_model(path, mask_id=mask_id, mesh=mesh, **dataclasses.asdict(cfg.runtime))


def _tokenizer(bundle: ModelBundle, where: str) -> str:
    return tokenizer_hash(bundle.tokenizer_json(where))


def place(params: Params, memory: str) -> Params:
    """A copy, cut over devices as it was, in the memory of the "device" or of the "host"."""
    kind = {"device": "device", "host": "pinned_host"}[memory]
    return jax.tree.map(
        lambda x: jax.device_put(x, x.sharding.with_memory_kind(kind), may_alias=False), params
    )


@functools.lru_cache(maxsize=8)
def make_reference_step(
    model_cfg: ModelConfig, accumulate: int = 1, mesh: Mesh | None = None
) -> ReferenceStep:
    """What Batch.reference holds, as a jitted function of the reference's parameters.

    A program of its own: nothing differentiates or donates the parameters, and parameters that
    rest in the host's memory are on the device only while it runs. Rows are taken in `accumulate`
    micro-batches, as the train step takes them. mesh: what cuts rows and parameters; by default all
    are where the parameters are. Experts have room for the worst case, as nothing here tells of an
    overflow.
    """
    model_cfg = model_cfg.with_room_for_all

    def step(params: Params, batch: Batch, context: Context) -> Float[Array, "B L"]:
        model = merge_params(model_cfg, jax.device_put(params, jax.memory.Space.Device))
        micro = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), batch)
        micro = jax.tree.map(lambda x: constrain(x, None, "batch"), micro)
        shares = jax.lax.map(lambda rows: bound_shares(model, rows, context), micro)
        return shares.reshape(batch.tokens.shape)

    if mesh is None:
        return jax.jit(step)
    rows = batch_sharding(mesh)
    return jax.jit(
        meshed(mesh)(step), in_shardings=(None, rows, replicated(mesh)), out_shardings=rows
    )


# ---- bounds computed once ------------------------------------------------------------------------


def cached_bounds(
    cfg: TrainConfig,
    reference: ModelBundle,
    corpus: Corpus,
    context: Context,
    mesh: Mesh | None = None,
) -> Corpus:
    """The corpus with the reference's bounds on its training pairs, from the file
    config.reference.cache; where that does not exist, they are computed and it is written.

    Raises: ConfigError where the file was made under other circumstances, or is none of ours.
    """
    path, key = Path(cfg.reference.cache), _key(cfg, reference, corpus, context)
    if path.exists():
        bounds = _read(path, key)
    else:
        step = make_reference_step(reference.config, 1, mesh)
        rows = cfg.data.rows_per_step // cfg.optimizer.accumulate
        bounds = [
            bounds_of_pairs(step, reference.params, context, part, rows, mesh)
            for part in corpus.pairs(cfg.data)
        ]
        if jax.process_index() == 0:
            _write(path, key, bounds)
    sources = (
        dataclasses.replace(source, reference=values)
        for source, values in zip(corpus.sources, bounds, strict=True)
    )
    return dataclasses.replace(corpus, sources=tuple(sources))


def fetched(
    step: ReferenceStep, params: Params, batch: Batch, context: Context, mesh: Mesh | None
) -> np.ndarray:
    """What the step gives for rows that every process has, on every process's host."""
    batch = batch if mesh is None else place_batch(batch, mesh)
    shares = step(params, batch, context)
    return np.asarray(multihost_utils.process_allgather(shares, tiled=True))


def bounds_of_pairs(
    step: ReferenceStep,
    params: Params,
    context: Context,
    rows: BestFitRows,
    rows_per_step: int,
    mesh: Mesh | None = None,
) -> np.ndarray:
    """fp32 [documents, 2]: bounds on the chosen and the rejected text of each pair of an epoch; NaN
    for pairs that no row holds."""
    bounds = np.full((len(rows.documents.ids), 2), np.nan, np.float32)
    numbers = range(0, rows.epoch_rows, rows_per_step)
    for first in progress.bar(numbers, "reference", unit="step"):
        chosen = np.minimum(np.arange(first, first + rows_per_step), rows.epoch_rows - 1)
        fields = [rows[int(number)] for number in chosen]
        batch = to_batch({name: np.stack([f[name] for f in fields]) for name in fields[0]})
        shares = fetched(step, params, batch, context, mesh)
        for number, share, segments in zip(chosen, shares, batch.segment_ids, strict=True):
            documents = rows.documents_of(int(number))
            sums = np.bincount(segments, weights=share, minlength=2 * len(documents) + 1)
            bounds[documents] = sums[1:].reshape(-1, 2)
    return bounds


def _key(
    cfg: TrainConfig, reference: ModelBundle, corpus: Corpus, context: Context
) -> dict[str, Any]:
    """All that the bounds depend on, by what a user would call it."""
    return {
        "reference": reference.checksums(),
        "data": [source.train.digest for source in corpus.sources],
        "config.seed": cfg.seed,
        "config.dpo": {"samples": cfg.dpo.samples, "antithetic": cfg.dpo.antithetic},
        "config.noise": dataclasses.asdict(cfg.noise),
        "config.schedule.posttrain_block": int(context.block_size),
        "config.data": {
            name: getattr(cfg.data, name) for name in ("row_length", "pad_multiple", "block_anchor")
        },
        "config.runtime": {"dtype": cfg.runtime.dtype, "param_dtype": cfg.runtime.param_dtype},
    }


def _read(path: Path, key: dict[str, Any]) -> list[np.ndarray]:
    where = f"config.reference.cache={str(path)!r}"
    try:
        with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
            made = json.loads(str(file["key"]))
            bounds = [file[f"bounds_{i}"] for i in range(len(key["data"]))] if made == key else []
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ConfigError(f"{where} holds no bounds of a reference ({error}): remove it") from None
    stale = [name for name in key if made.get(name) != key[name]]
    if stale:
        raise ConfigError(
            f"{where} is stale: it was made with another {stale[0]} ({made.get(stale[0])} there, "
            f"{key[stale[0]]} now); remove it, or name another file, and it is computed anew"
        )
    return bounds


def _write(path: Path, key: dict[str, Any], bounds: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        arrays: dict[str, Any] = {f"bounds_{i}": values for i, values in enumerate(bounds)}
        np.savez(file, key=np.asarray(json.dumps(key)), **arrays)
    partial.replace(path)
