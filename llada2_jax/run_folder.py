"""A run folder that explains itself: its config, and by whom and where it was started each time."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from llada2_jax.config import ConfigError, TrainConfig
from llada2_jax.files import append_line, replace_text

# Fields that do not change what a step computes (its sums' order aside), or that one changes to get
# past a stop; a group's name stands for all of its fields.
FREE = (
    *("log_every", "checkpoint", "workdir", "spikes", "distributed", "mesh", "wandb_project"),
    *("optimizer.accumulate", "runtime.expert_buffer"),
)

# What a run is made of besides its config: what it is called, and which field says where it is.
ORIGINS = {
    "parent": ("model", "init.checkpoint"),
    "reference_model": ("model", "reference.checkpoint"),
    "corpus": ("corpus", "data"),
}

README = """\
A training run of llada2_jax. `llada2 train` with the same config and this folder as --workdir goes
on where the newest checkpoint left off; `llada2 runs compare` sets runs side by side.

    config.json      every field of the config, and checksums of the models and data it started from
    starts.jsonl     a line a start: step, time, command, revision, versions, devices, mesh, data
    metrics.jsonl    a line a step, validation or rollback of the surviving history
    tensorboard/     the same as curves
    checkpoints/     one folder a step; each is a complete model (docs/reliability.md)
    damaged/         checkpoints that were found damaged and passed over; delete them at leisure
"""


def record_config(
    workdir: Path, cfg: TrainConfig, **origins: Mapping[str, int | str] | None
) -> None:
    """Writes config.json once; a resumed run must have been started with the same config, and from
    the same models and data.

    origins: for the keys of ORIGINS, what tells the parts of a thing from others (checksums, say);
    None where the config names no such thing.

    Raises: ConfigError that names the first field that differs, FREE ones aside, or the first part
      of a model or of the data.
    """
    described = json.loads(json.dumps(dataclasses.asdict(cfg)))
    path = workdir / "config.json"
    if path.exists():
        before = _completed(read_config(workdir), dataclasses.asdict(TrainConfig()))
        old, new = (flat({name: c.get(name) for name in described}) for c in (before, described))
        for field in {**new, **old}:
            if old.get(field) != new.get(field) and not _is_free(field):
                raise ConfigError(
                    f"{workdir} holds a run with another config.{field}: {old.get(field)} there, "
                    f"{new.get(field)} now; choose another workdir, or remove it to start again"
                )
        for name, now in origins.items():
            _check_origin(workdir, name, before.get(name), now)
    workdir.mkdir(parents=True, exist_ok=True)
    recorded = described | {name: now for name, now in origins.items() if now}
    replace_text(path, json.dumps(recorded, indent=1))
    replace_text(workdir / "README.txt", README)


def flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one: {"optimizer.learning_rate": 1e-3, ...}."""
    found = {}
    for name, child in value.items():
        path = f"{prefix}{name}"
        found |= flat(child, f"{path}.") if isinstance(child, dict) else {path: child}
    return found


def _is_free(path: str) -> bool:
    return any(f"{path}.".startswith(f"{name}.") for name in FREE)


def _completed(stored: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """A run of a version that lacked a field goes on with the field's default: it did what the
    default does."""
    filled = {
        name: _completed(stored[name], value)
        if isinstance(value, dict) and isinstance(stored.get(name), dict)
        else stored.get(name, value)
        for name, value in json.loads(json.dumps(defaults)).items()
    }
    return stored | filled


def _check_origin(
    workdir: Path, name: str, before: Any, now: Mapping[str, int | str] | None
) -> None:
    """A path may hold something else than it did. Runs of older versions did not take note."""
    if not isinstance(before, dict) or not now:
        return
    what, field = ORIGINS[name]
    changed = [part for part in [*now, *before] if before.get(part) != now.get(part)]
    if changed:
        raise ConfigError(
            f"{workdir} holds a run with another {what} than config.{field} now is: its "
            f"{changed[0]} changed; put the {what} back that the run began with, choose another "
            "workdir, or remove it to start again"
        )


def read_config(workdir: Path) -> dict[str, Any]:
    """The config of a run. Raises: ConfigError where it is absent or unreadable."""
    path = Path(workdir) / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{workdir} is not a run: it has no config.json") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not JSON ({error}): remove it to go on with the config you give"
        ) from None
    if not isinstance(config, dict):
        raise ConfigError(f"{path} holds no config: remove it to go on with the config you give")
    return config


def record_start(workdir: Path, *, step: int, params: Any, data: Any) -> None:
    """Appends what can be known about this start to starts.jsonl.

    step: the first one to be taken, less one. params: say by their sharding what the mesh is.
    data: a JSON description of the corpus.
    """
    line = {
        "step": step,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        **environment(),
        "mesh": _mesh(params),
        "data": data,
    }
    append_line(workdir / "starts.jsonl", json.dumps(line))


def read_starts(workdir: Path) -> list[dict[str, Any]]:
    """The lines of starts.jsonl; those cut off by a crash are left out."""
    path, lines = Path(workdir) / "starts.jsonl", []
    for text in path.read_text(errors="replace").splitlines() if path.exists() else []:
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict):
            lines.append(line)
    return lines


def machine() -> dict[str, Any]:
    """What a figure was measured on, in a few words: versions of Python and jax, kind of device,
    cores."""
    return {
        "python": platform.python_version(),
        "jax": jax.__version__,
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
    }


def environment() -> dict[str, Any]:
    """Git revision, versions of the packages we require, host, the machine and how many devices."""
    return {
        "git": _git(),
        "packages": _packages(),
        "host": platform.node(),
        **machine(),
        "processes": jax.process_count(),
        "devices": jax.device_count(),
    }


def _git() -> dict[str, Any] | None:
    """The revision of the source this runs from, and whether it was changed; None if installed."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head, status = (
            subprocess.run([*git, *args], capture_output=True, text=True, timeout=10, check=True)
            for args in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"revision": head.stdout.strip(), "changed_files": len(status.stdout.splitlines())}


def _packages() -> dict[str, str]:
    try:
        required = importlib.metadata.requires("llada2-jax") or []
    except importlib.metadata.PackageNotFoundError:
        required = ["jax", "flax", "optax", "orbax-checkpoint"]
    names = {re.split(r"[^\w.-]", r, maxsplit=1)[0] for r in required if "extra ==" not in r}
    versions = {}
    for name in sorted(names | {"jaxlib"}):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _mesh(params: Any) -> dict[str, int] | None:
    """{axis: size} of the mesh that the parameters are placed on; None on a single device."""
    sharding = getattr(jax.tree.leaves(params)[0], "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding):
        return None
    return dict(sharding.mesh.shape)
