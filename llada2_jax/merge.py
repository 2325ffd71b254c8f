"""`llada2 merge`: the average of checkpoints of a run.

The mean of the best ones is the paper's (arXiv 2512.15745 §4.3). Weights that follow from a
learning-rate decay, after a stable phase without one, are Warmup-Stable-Merge's (arXiv 2507.17634).
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada2_jax import checkpoint, folders, progress
from llada2_jax.checkpoint import CheckpointError, ModelBundle, ParamReader, ParamWriter
from llada2_jax.checksums import box_checksum
from llada2_jax.errors import EXIT_STATUS, UsageError
from llada2_jax.hub import open_source
from llada2_jax.hub.adapted import AdaptedSource, merged_description
from llada2_jax.hub.config import same_architecture
from llada2_jax.inputs import positive

Reader = ParamReader | AdaptedSource
METRIC = "validation.bits_per_byte"
MODES = ("min", "max")
TOP_K = 4

EXAMPLES = f"""
examples:
  # The four best checkpoints of a run, by validation loss:
  llada2 merge runs/mini --out runs/mini/merged

  # These, whatever their loss:
  llada2 merge runs/mini/checkpoints/9000 runs/mini/checkpoints/9500 --out runs/mini/merged

  # The last ten, weighted as if the learning rate had decayed meanwhile:
  llada2 merge runs/mini --last 10 --average one-minus-sqrt --out runs/mini/decayed

Losses compare only among checkpoints of one kind (phase, objective and block size): by default
the newest checkpoint's; what was left out is printed. Memory holds a few chunks of 64 MB,
whatever the size of the model and the number of checkpoints.

{EXIT_STATUS}"""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A training checkpoint and what it was measured at. value, kind: None where it was not."""

    path: Path
    step: int
    value: float | None
    kind: str | None


@dataclasses.dataclass(frozen=True)
class Selection:
    """chosen: best first. excluded: {path: why} of those that do not compare."""

    chosen: tuple[Candidate, ...]
    excluded: dict[Path, str]
    kind: str | None
    metric: str


# ---- choosing ------------------------------------------------------------------------------------


def select_best(
    run_dir: Path | Sequence[Path],
    k: int = TOP_K,
    metric: str = METRIC,
    *,
    mode: str = "min",
    kind: str | None = None,
    newest: bool = False,
) -> Selection:
    """The k best (or the k newest) checkpoints of a run, or of a list of runs and checkpoints.

    metric: path in the train item's metrics, e.g. "validation.bits_per_byte"; its group's `kind`
    says what was measured, and only one kind is compared. kind: default that of the newest
    checkpoint. mode: "min" or "max".
    Raises: CheckpointError where fewer than k checkpoints compare.
    """
    if mode not in MODES or k < 1:
        raise CheckpointError(f"mode={mode!r}, k={k}: mode is one of {MODES}, k at least 1")
    paths = [run_dir] if isinstance(run_dir, str | Path) else list(run_dir)
    found = [_candidate(path, metric) for path in expand(paths)]
    found.sort(key=lambda c: c.step)
    measured = [c for c in found if c.value is not None and math.isfinite(c.value)]
    if not measured:
        raise CheckpointError(f"no checkpoint under {_shown(paths)} has a finite {metric}")
    kind = measured[-1].kind if kind is None else kind
    excluded = {c.path: _reason(c, metric) for c in found if c not in measured}
    excluded |= {c.path: f"its kind is {c.kind}, not {kind}" for c in measured if c.kind != kind}
    comparable = [c for c in measured if c.kind == kind]
    if len(comparable) < k:
        raise CheckpointError(
            f"{k} checkpoints were asked for, but {len(comparable)} under {_shown(paths)} have "
            f"{metric} of kind {kind}; kinds found: {sorted({str(c.kind) for c in measured})}. "
            f"Ask for fewer by --{'last' if newest else 'top-k'}, or name another --kind"
        )
    sign = 0 if newest else 1 if mode == "min" else -1
    comparable.sort(key=lambda c: (sign * (c.value or 0.0), -c.step))
    return Selection(tuple(comparable[:k]), excluded, kind, metric)


def expand(paths: Sequence[Path]) -> list[Path]:
    """Runs become their checkpoints, checkpoints stay. Raises CheckpointError for anything else,
    and for a checkpoint that is named twice."""
    found: list[Path] = []
    for path in map(Path, paths):
        steps = {} if folders.is_checkpoint(path) else folders.step_folders(path)
        found += steps.values() or [folders.require_checkpoint(path)]
    real = [path.resolve() for path in found]
    twice = sorted({str(path) for path in found if real.count(path.resolve()) > 1})
    if twice:
        raise CheckpointError(f"named twice: {', '.join(twice)}")
    return found


def _candidate(path: Path, metric: str) -> Candidate:
    item = checkpoint.read_train_item(path)
    group = item.get("metrics")
    *parents, name = metric.split(".")
    for key in parents:
        group = group.get(key) if isinstance(group, dict) else None
    measured = group if isinstance(group, dict) else {}
    value = measured.get(name)
    number = float(value) if isinstance(value, int | float) else None
    return Candidate(path, _step(path, item), number, measured.get("kind"))


def _step(path: Path, train_item: dict[str, Any]) -> int:
    step = train_item.get("step")
    if type(step) is not int:
        raise CheckpointError(f"{path}: the train item's step is {step!r}, not a number of steps")
    return step


def _reason(candidate: Candidate, metric: str) -> str:
    if candidate.value is None:
        return f"it has no {metric}"
    return f"its {metric} is {candidate.value}"


def _shown(paths: Sequence[Path]) -> str:
    return ", ".join(map(str, paths))


# ---- averaging -----------------------------------------------------------------------------------

# Learning rate, as a share of the stable one, when the fraction x of a decay is over.
DECAYS: dict[str, Callable[[float], float]] = {
    "mean": lambda x: 1 - x,
    "one-minus-sqrt": lambda x: 1 - math.sqrt(x),
    "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2,
}
AVERAGES = (*DECAYS, "ema")
EMA_DECAY = 0.8


def average_weights(average: str, count: int, ema_decay: float = EMA_DECAY) -> list[float]:
    """Weights, which sum to 1, of `count` checkpoints, the oldest first.

    With D one of DECAYS, checkpoint j gets D(j / count) - D((j + 1) / count). A checkpoint is the
    oldest one plus the updates up to it, so that the updates between checkpoints j - 1 and j come
    to be scaled by D(j / count): the average is what a run with that decay would have ended at,
    had its gradients been the same. The linear decay gives the mean. "ema": an exponential moving
    average over checkpoints, starting at the oldest.
    """
    if average == "ema":
        newest_first = [(1 - ema_decay) * ema_decay**age for age in range(count - 1)]
        return [ema_decay ** (count - 1), *reversed(newest_first)]
    decay = DECAYS[average]
    shares = [decay(j / count) for j in range(count)] + [0.0]
    return [a - b for a, b in itertools.pairwise(shares)]


def merge_checkpoints(
    paths: Sequence[Path],
    out: Path,
    *,
    weights: Sequence[float] | None = None,
    provenance: dict[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes the average of model checkpoints as a model checkpoint, slice by slice.

    The sum is fp32; the result has the checkpoints' dtypes, config, tokenizer and defaults.
    weights: relative weight of each checkpoint, divided by their sum; default: all the same.
    provenance: added to the result's, which always names the sources.
    Raises: CheckpointError for checkpoints of different models, damaged ones, parameters that are
      not finite, and weights that are not one number >= 0 a checkpoint.
    """
    paths = [folders.require_checkpoint(Path(path)) for path in paths]
    if not paths:
        raise CheckpointError("merge: no checkpoints")
    weights = [1.0] * len(paths) if weights is None else list(weights)
    _check_weights(weights, len(paths))
    weights = [weight / max(weights) for weight in weights]  # within the range of float32
    bundles = [checkpoint.read_bundle(path) for path in paths]
    cache = checkpoint.CACHE_BYTES // len(paths)
    readers = [_reader(path, bundle, cache) for path, bundle in zip(paths, bundles, strict=True)]
    bundles = [merged_description(bundle) for bundle in bundles]
    for path, bundle, reader in zip(paths[1:], bundles[1:], readers[1:], strict=True):
        _check_same_model(paths[0], bundles[0], path, bundle)
        _check_same_arrays(paths[0], readers[0], path, reader)
    sources = [
        {"name": path.name, "weight": weight / math.fsum(weights), **bundle.provenance}
        for path, weight, bundle in zip(paths, weights, bundles, strict=True)
    ]
    provenance = {"merged": sources, **(provenance or {})}
    with folders.replacing(out, overwrite=overwrite) as folder:
        _write_average(readers, weights, folder / folders.PARAMS)
        checkpoint.write_items(folder, dataclasses.replace(bundles[0], provenance=provenance))


def _reader(path: Path, bundle: ModelBundle, cache: int) -> Reader:
    if bundle.config.lora is None:
        return ParamReader(path / folders.PARAMS, cache)
    source = open_source(path, bundle)
    assert isinstance(source, AdaptedSource)
    return source


def _check_weights(weights: Sequence[float], count: int) -> None:
    if len(weights) != count:
        raise CheckpointError(f"{len(weights)} weights were given for {count} checkpoints")
    if not all(math.isfinite(w) and w >= 0 for w in weights) or not any(weights):
        raise CheckpointError(f"weights {list(weights)}: none may be negative, and not all zero")


def _check_same_model(a_path: Path, a: ModelBundle, b_path: Path, b: ModelBundle) -> None:
    differing = [
        name
        for name in ("special", "tokenizer_files", "hf_config")
        if getattr(a, name) != getattr(b, name)
    ]
    if not same_architecture(a.config, b.config):
        differing.insert(0, "config")
    if differing:
        raise CheckpointError(
            f"{a_path} and {b_path} are different models: their {', '.join(differing)} differ"
        )


def _check_same_arrays(a_path: Path, a: Reader, b_path: Path, b: Reader) -> None:
    for name in sorted(a.specs.keys() | b.specs.keys()):
        if a.specs.get(name) != b.specs.get(name):
            raise CheckpointError(
                f"parameter {name} is {_spec(a, name)} in {a_path}, {_spec(b, name)} in {b_path}"
            )


def _spec(reader: Reader, name: str) -> str:
    spec = reader.specs.get(name)
    return "absent" if spec is None else f"{spec.dtype}{list(spec.shape)}"


def _write_average(readers: Sequence[Reader], weights: Sequence[float], folder: Path) -> None:
    specs = readers[0].specs
    writer = ParamWriter(folder, specs, like=readers[0])
    total = sum(spec.nbytes for spec in specs.values())
    with progress.bar(what="merging", total=total, unit="B") as bar:
        for name, spec in specs.items():
            sums = [0] * len(readers)
            for box in readers[0].boxes(name):
                average = _average(readers, weights, name, box, sums)
                writer.write(name, box, average.astype(spec.dtype))
                bar.update(average.size * spec.dtype.itemsize)
            for reader, found in zip(readers, sums, strict=True):
                if isinstance(reader, ParamReader):
                    reader.verify(name, found)
    writer.finish()


def _average(
    readers: Sequence[Reader],
    weights: Sequence[float],
    name: str,
    box: tuple[slice, ...],
    sums: list[int],
) -> np.ndarray:
    """The fp32 average of a slice; adds what was read to the checksums of each reader."""
    total = np.float32(0)
    for i, (reader, weight) in enumerate(zip(readers, weights, strict=True)):
        value = reader.read(name, box)
        if reader.verifies:
            sums[i] += box_checksum(value, box)
        total = total + np.float32(weight) * value.astype(np.float32)
    if not np.isfinite(total).all():
        raise CheckpointError(f"parameter {name} has weights that are not finite")
    return np.asarray(total / np.float32(math.fsum(weights)))


# ---- the command ---------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="llada2 merge",
        description="Average the best checkpoints of a run into one.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="RUN_OR_CHECKPOINT",
        help="a run's workdir, of which the best are chosen, or checkpoints",
    )
    p.add_argument("--out", type=Path, required=True, help="the checkpoint to write")
    count = p.add_mutually_exclusive_group()
    count.add_argument(
        "--top-k",
        type=positive,
        metavar="K",
        help=f"average the best so many (default: {TOP_K} where a run is named; all of the "
        "checkpoints where only checkpoints are)",
    )
    count.add_argument(
        "--last", type=positive, metavar="N", help="average the newest so many instead"
    )
    p.add_argument(
        "--average",
        choices=AVERAGES,
        default="mean",
        help="how to weight checkpoints in the order of their steps: all the same, as a decay of "
        "the learning rate would, or as an exponential moving average (default: mean)",
    )
    p.add_argument(
        "--ema-decay",
        type=float,
        metavar="D",
        help=f"weight of the average so far, for --average=ema (default: {EMA_DECAY})",
    )
    p.add_argument(
        "--weights",
        type=_numbers,
        metavar="A,B,...",
        help="relative weights of the checkpoints named, in their order",
    )
    p.add_argument(
        "--metric",
        metavar="NAME",
        help=f"what to compare, e.g. train.loss, of that step alone (default: {METRIC})",
    )
    p.add_argument("--mode", choices=MODES, help=f"what is best (default: {MODES[0]})")
    p.add_argument(
        "--kind",
        help="compare this kind of loss, e.g. decay-32:bdlm-32 (default: the newest checkpoint's)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace OUT if it exists")
    return p


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    args = parser().parse_args(argv)
    chooses = args.top_k is not None or args.last is not None
    named = not chooses and all(map(folders.is_checkpoint, args.paths))
    _check(args, named=named)
    _run(args, named=named)
    return 0


def _numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


def _check(args: argparse.Namespace, *, named: bool) -> None:
    """What would not be read is an error. named: the checkpoints are, and nothing is chosen."""
    for option in ("metric", "mode", "kind"):
        if named and getattr(args, option) is not None:
            raise UsageError(
                f"--{option} chooses among checkpoints, and these are named one by one: add "
                "--top-k or --last, or leave it out"
            )
    if args.mode is not None and args.last is not None:
        raise UsageError("--mode says what is best, and --last takes the newest: leave one out")
    if args.weights is not None and not (named and args.average == "mean"):
        raise UsageError(
            "--weights belong to checkpoints that are named one by one, and exclude --top-k, "
            "--last and --average"
        )
    if args.ema_decay is not None and args.average != "ema":
        raise UsageError("--ema-decay belongs to --average=ema: add it, or leave both out")
    if args.ema_decay is not None and not 0 < args.ema_decay < 1:
        raise UsageError(f"--ema-decay={args.ema_decay} must lie between 0 and 1")


def _run(args: argparse.Namespace, *, named: bool) -> None:
    if named:
        chosen, provenance = expand(args.paths), {}
    else:
        newest = args.last is not None
        k = args.last if newest else args.top_k or TOP_K
        metric, mode = args.metric or METRIC, args.mode or MODES[0]
        selection = select_best(args.paths, k, metric, mode=mode, kind=args.kind, newest=newest)
        chosen, provenance = _report(selection)
    weights = args.weights
    if args.average != "mean":
        chosen = sorted(chosen, key=lambda path: _step(path, checkpoint.read_train_item(path)))
        weights = average_weights(args.average, len(chosen), args.ema_decay or EMA_DECAY)
        provenance["average"] = args.average
    merge_checkpoints(
        chosen, args.out, weights=weights, provenance=provenance, overwrite=args.overwrite
    )
    what = "weighted mean" if weights else "mean"
    print(f"wrote the {what} of {len(chosen)} checkpoints to {args.out}")


def _report(selection: Selection) -> tuple[list[Path], dict[str, Any]]:
    """Prints the selection; returns its paths, best first, and what to remember of it."""
    print(f"{selection.metric}, kind {selection.kind}:")
    for c in selection.chosen:
        print(f"  {c.value:.6g}  step {c.step}  {c.path}")
    for path, reason in selection.excluded.items():
        print(f"  left out: {path}: {reason}")
    steps = [{"step": c.step, "value": c.value} for c in selection.chosen]
    chosen = {"metric": selection.metric, "kind": selection.kind, "steps": steps}
    return [c.path for c in selection.chosen], {"selection": chosen}
