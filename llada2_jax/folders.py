"""What a directory is: a model checkpoint of ours, a Hugging Face folder, a run, a step of a run;
and putting a new model where an old one is."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llada2_jax.errors import UserError
from llada2_jax.files import sync

PARAMS, OPTIMIZER = "params", "optimizer"
MODEL, TOKENIZER, TRAIN, CHECKSUMS = "model", "tokenizer", "train", "checksums"
HF_CONFIG, HF_GENERATION = "config.json", "generation_config.json"
HF_INDEX = "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)
# All that a model written here consists of, in either format. Orbax adds the last of the first.
_CHECKPOINT = {PARAMS, MODEL, TOKENIZER, CHECKSUMS, "_CHECKPOINT_METADATA"}
_HF_FOLDER = {HF_CONFIG, HF_GENERATION, HF_INDEX, *TOKENIZER_FILES}
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")


class CheckpointError(UserError, ValueError):
    """A checkpoint that cannot be read or written; the message names the part and the way out."""


def read_json(path: Path) -> dict[str, Any]:
    """Raises: CheckpointError for a file that is absent or no JSON object."""
    try:
        value = json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: the checkpoint is not complete") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested without end
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


# ---- what is there -------------------------------------------------------------------------------


def is_checkpoint(path: Path) -> bool:
    """Whether the directory is a model checkpoint of ours (a training step's folder is one)."""
    return (Path(path) / MODEL / "metadata").is_file()


def is_run(path: Path) -> bool:
    """Whether the directory is a training run's, which need not have checkpoints yet."""
    return bool(step_folders(path)) or "workdir" in _described(path)


def is_hf_folder(path: Path) -> bool:
    """Whether the directory has a Hugging Face config.json, be it a usable one or not."""
    return (Path(path) / HF_CONFIG).is_file() and not is_run(path)


def _described(path: Path) -> dict[str, Any]:
    """The folder's config.json: Hugging Face's of a model, or that of a run."""
    try:
        return read_json(Path(path) / HF_CONFIG)
    except (CheckpointError, OSError):
        return {}


def step_folders(path: Path) -> dict[int, Path]:
    """{step: folder} of a run's checkpoints, in order; `path` is the run or its `checkpoints`."""
    for folder in (Path(path) / "checkpoints", Path(path)):
        steps = {int(p.name): p for p in _subfolders(folder) if p.name.isdigit()}
        steps = {step: p for step, p in sorted(steps.items()) if is_checkpoint(p)}
        if steps:
            return steps
    return {}


def _subfolders(path: Path) -> list[Path]:
    return [p for p in path.iterdir() if p.is_dir()] if path.is_dir() else []


def require_checkpoint(path: Path) -> Path:
    """`path`, if it is a model checkpoint. Raises CheckpointError that says what it is instead."""
    path = Path(path)
    if is_checkpoint(path):
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory")
    steps = step_folders(path)
    if steps:
        raise CheckpointError(
            f"{path} is a run, not a checkpoint: name one of its steps, "
            f"{next(iter(steps.values())).parent}/{{{','.join(map(str, steps))}}}, "
            "or average the best with `llada2 merge`"
        )
    if is_run(path):
        raise CheckpointError(
            f"{path} is a run without checkpoints: `llada2 train` with its config goes on with it"
        )
    if is_hf_folder(path):
        raise CheckpointError(
            f"{path} is a Hugging Face folder, not a checkpoint of ours: `llada2 convert` makes one"
        )
    raise CheckpointError(
        f"{path} is no model checkpoint: it has neither {MODEL}/metadata (ours) "
        f"nor {HF_CONFIG} (Hugging Face)"
    )


# ---- putting a model there -----------------------------------------------------------------------


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A new directory beside `path` that takes its place at the end, with all files on disk, or
    vanishes on an error.

    Raises: CheckpointError where `path` exists, unless `overwrite` and it is empty or a model as it
    is written here, and nothing else: a run, a training step or somebody's folder is never
    replaced.
    """
    path = Path(path).absolute()
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} exists: choose another path, remove it, or pass overwrite")
    if path.exists():
        _check_only_a_model(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.partial"
    work.mkdir()
    try:
        yield work
        for file in work.rglob("*"):  # a power loss must not leave the name and empty files
            if file.is_file():
                sync(file)
        _take_place(work, path)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _check_only_a_model(path: Path) -> None:
    """Raises: CheckpointError that names what would be lost if the folder were replaced."""
    names = {p.name for p in path.iterdir()} if path.is_dir() else {path.name}
    if path.is_dir() and not names:
        return
    if _is_our_checkpoint(path):
        others = names - _CHECKPOINT
    elif "model_type" in _described(path) and any(map(_WEIGHTS.fullmatch, names)):
        others = {n for n in names - _HF_FOLDER if not _WEIGHTS.fullmatch(n)}
    else:
        raise CheckpointError(
            f"{path} is not a model, so it is not replaced: it holds {_shown(names)}; "
            "choose another path, or remove it yourself"
        )
    if others:
        raise CheckpointError(
            f"{path} is more than a model, so it is not replaced: it holds {_shown(others)} too; "
            "choose another path, or remove it yourself"
        )


def _is_our_checkpoint(path: Path) -> bool:
    if not is_checkpoint(path) or not (path / PARAMS / "_METADATA").is_file():
        return False
    try:
        return "format_version" in read_json(path / MODEL / "metadata")
    except CheckpointError:
        return False


def _shown(names: set[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(sorted(names)[:3]) + more


def _take_place(work: Path, path: Path) -> None:
    """Renames `work` to `path`; what was there goes aside first and is removed last."""
    if not path.exists():
        os.rename(work, path)
        return
    old = work.with_suffix(".old")
    os.rename(path, old)
    os.rename(work, path)
    shutil.rmtree(old)
