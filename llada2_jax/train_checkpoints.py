"""What a run keeps on disk, and how it comes back.

Each `<workdir>/checkpoints/<step>/` is a model checkpoint (see checkpoint.py) that also holds the
items `optimizer` (moments and counters) and `train` (JSON: step, phase, metrics, data position).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from flax import nnx

from llada2_jax.checkpoint import CHUNK_BYTES, ModelBundle
from llada2_jax.config import CheckpointConfig
from llada2_jax.types import Params

ITEMS = ("params", "optimizer", "model", "tokenizer", "train")


@dataclasses.dataclass(frozen=True)
class KeepLastAndBest:
    """Preserves the newest checkpoints and, of each kind of validation loss, the best ones.

    Losses of different kinds (another block size, another phase) do not compare, so each kind has
    its own best.
    """

    last: int
    best: int

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kinds: dict[str, list[tuple[float, int]]] = {}
        for index, info in enumerate(checkpoints):
            metrics = info.metrics or {}
            if "bits_per_byte" in metrics:
                kinds.setdefault(metrics["kind"], []).append((metrics["bits_per_byte"], index))
        kept = set(range(len(checkpoints) - self.last, len(checkpoints)))
        for scores in kinds.values():
            kept |= {index for _, index in sorted(scores)[: self.best]}
        return [index in kept for index in range(len(checkpoints))]


class TrainCheckpoints:
    """Saves and restores a run's state under `<workdir>/checkpoints`."""

    def __init__(self, workdir: Path, cfg: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=KeepLastAndBest(cfg.keep_last, cfg.keep_best),
            enable_async_checkpointing=False,
        )
        folder = (Path(workdir) / "checkpoints").absolute()
        self._manager = ocp.CheckpointManager(folder, options=options, item_names=ITEMS)

    @property
    def latest(self) -> int | None:
        """The newest complete step; Orbax commits a step by renaming its folder at the end."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        bundle: ModelBundle,
        params: Params,
        optimizer: Any,
        train: dict[str, Any],
    ) -> None:
        """Writes step `step`; returns when it is on disk. A step that is there already stays.

        params: all parameters of the model. optimizer: any pytree of arrays. train: JSON; its
        metrics["validation"] decides what is kept.
        """
        pure = nnx.to_pure_dict(params)
        chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), pure)
        self._manager.save(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeSave(pure, save_args=chunked),
                optimizer=ocp.args.PyTreeSave(_leaves(optimizer)),
                model=ocp.args.JsonSave(bundle.model_item()),
                tokenizer=ocp.args.JsonSave(bundle.tokenizer_item()),
                train=ocp.args.JsonSave(train),
            ),
            metrics=train["metrics"].get("validation"),
        )
        self._manager.wait_until_finished()

    def restore(self, step: int, params: Params, optimizer: Any) -> tuple[Params, Any, dict]:
        """(params, optimizer, train) of a step, in the structure of the two pytrees given."""
        pure = nnx.to_pure_dict(params)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.PyTreeRestore(pure, _restore_args(pure)),
                optimizer=ocp.args.PyTreeRestore(
                    _leaves(optimizer), _restore_args(_leaves(optimizer))
                ),
                train=ocp.args.JsonRestore(),
            ),
        )
        params = jax.tree.map(lambda x: x, params)
        nnx.replace_by_pure_dict(params, restored["params"])
        leaves = [restored["optimizer"][name] for name in _leaves(optimizer)]
        optimizer = jax.tree.unflatten(jax.tree.structure(optimizer), leaves)
        return params, optimizer, restored["train"]

    def close(self) -> None:
        self._manager.close()


def _leaves(tree: Any) -> dict[str, jax.Array]:
    """Leaves by number: the optimizer's own containers are not part of the format."""
    return {f"{i:04d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def _restore_args(tree: Any) -> Any:
    return ocp.checkpoint_utils.construct_restore_args(tree)
