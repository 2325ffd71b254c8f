"""Low-rank adapters (LoRA): on a model, off it again, and merged into it.

Only the adapters are trained, and only they are in the checkpoints of such a run, which name the
model under them. Whoever loads one gets the merged model: base + alpha / rank · A B.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float

from llada2_jax.checkpoint import ModelBundle, fill_params, flatten
from llada2_jax.config import ConfigError
from llada2_jax.model import Transformer, build
from llada2_jax.model.layers import Adapter
from llada2_jax.sharding import shardings
from llada2_jax.types import ADAPTED_MODULES, LoRAConfig, ModelConfig, Params
from pallas_kernels.block_layout import HostOrDevice

_SUFFIX = "_adapter"


def modules_of(cfg: ModelConfig) -> tuple[str, ...]:
    """Which of ADAPTED_MODULES a model has."""
    present = {
        "attention": cfg.num_layers > 0,
        "dense": cfg.num_dense_layers > 0,
        "experts": cfg.num_moe_layers > 0,
        "shared": cfg.num_moe_layers > 0 and cfg.num_shared_experts > 0,
    }
    return tuple(name for name in ADAPTED_MODULES if present[name])


def check_modules(cfg: ModelConfig, lora: LoRAConfig) -> None:
    """Raises: ConfigError for a module that the model lacks."""
    available = modules_of(cfg)
    missing = [name for name in lora.modules if name not in available]
    if missing or not lora.modules:
        raise ConfigError(
            f"config.lora.modules={lora.modules}: the model has no module "
            f"{missing[0] if missing else 'of that name'!r}; choose from {', '.join(available)}"
        )


def add_adapters(
    bundle: ModelBundle, lora: LoRAConfig, *, path: str, seed: int, mesh: Mesh | None = None
) -> ModelBundle:
    """The model with fresh adapters, which add nothing yet.

    path: where the model is kept; bundle.provenance["checksums"] tell it from another one. mesh:
    what its parameters are cut by.
    Raises: ConfigError for a module that the model lacks.
    """
    check_modules(bundle.config, lora)
    assert bundle.params is not None
    config = dataclasses.replace(bundle.config, lora=lora)
    params = nnx.merge_state(bundle.params, init_adapters(config, seed, mesh))
    base = {
        "path": path,
        "param_dtype": config.param_dtype,
        "checksums": bundle.provenance["checksums"],
    }
    return dataclasses.replace(bundle, config=config, params=params, base=base)


def init_adapters(cfg: ModelConfig, seed: int, mesh: Mesh | None = None) -> Params:
    """Fresh adapters of a model whose config has them, cut by the mesh as they are made."""

    def create() -> Params:
        return split_trained(nnx.state(Transformer(cfg, nnx.Rngs(seed))))[0]

    placed = None if mesh is None else shardings(split_trained(build(cfg)[1])[0], mesh)
    return jax.jit(create, out_shardings=placed)()


def split_trained(params: Params) -> tuple[Params, Params]:
    """What is trained, the adapters where there are any; and the rest."""
    kind = Adapter if jax.tree.leaves(nnx.filter_state(params, Adapter)) else nnx.Param
    trained, rest = nnx.split_state(params, kind, ...)
    return trained, rest


def without_adapters(bundle: ModelBundle) -> ModelBundle:
    """The model with its adapters merged into its weights, in their dtype."""
    lora = bundle.config.lora
    if lora is None:
        return bundle
    config = dataclasses.replace(bundle.config, lora=None)
    leaves = flatten(bundle.params)
    low_rank = {path: leaf for path, leaf in leaves.items() if _SUFFIX + "/" in path}
    merged = {
        path: merged_slice(path, leaf, (slice(None),) * leaf.ndim, low_rank, lora.scale)
        for path, leaf in leaves.items()
        if path not in low_rank
    }
    params = fill_params(build(config)[1], merged)
    return dataclasses.replace(bundle, config=config, params=params, base={})


def merged_slice(
    path: str,
    values: Float[HostOrDevice, "..."],
    index: tuple[slice, ...],
    adapters: Mapping[str, HostOrDevice],
    scale: float,
) -> Float[HostOrDevice, "..."]:
    """A slice of a weight with what its adapter adds, summed in fp32 and cast back.

    values: the weight at `index`, which has a slice for each of its axes. adapters: the factors of
    all adapted weights by path, whole.
    """
    if f"{path}{_SUFFIX}/a" not in adapters:
        return values
    a, b = (adapters[f"{path}{_SUFFIX}/{name}"] for name in "ab")
    inputs = a.ndim - 1
    groups = inputs + b.ndim - 1 - len(index)
    a, b = a[index[:inputs]], b[(*index[:groups], slice(None), *index[inputs:])]
    lead, rank = a.shape[:groups], a.shape[-1]
    added = a.reshape(*lead, -1, rank) @ b.reshape(*lead, rank, -1)
    return (values.astype(np.float32) + scale * added.reshape(values.shape)).astype(values.dtype)
