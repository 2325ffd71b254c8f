"""Model checkpoints in and out: ours (see `llada2_jax.checkpoint`) and Hugging Face folders."""

from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.hub.config import config_from_hf, config_to_hf
from llada2_jax.hub.loading import load_bundle, load_model, open_source, param_shapes

__all__ = [
    "CheckpointError",
    "ModelBundle",
    "config_from_hf",
    "config_to_hf",
    "load_bundle",
    "load_model",
    "open_source",
    "param_shapes",
]
