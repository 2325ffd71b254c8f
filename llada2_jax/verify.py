"""`llada2 verify`: proves a port of the model and the sampler against golden numbers.

The goldens (`goldens.npz`) are what the released model file computes on the same weights; their
format is described beside them, in tests/goldens/README.md. Everything here runs in fp32.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import re
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from llada2_jax import progress
from llada2_jax.checkpoint import CheckpointError, ModelBundle
from llada2_jax.errors import EXIT_STATUS, UserError
from llada2_jax.hub import load_model
from llada2_jax.model import merge_params
from llada2_jax.sampler import SamplerOptions, generate_tokens
from llada2_jax.types import ModelConfig, Params, SpecialTokens
from pallas_kernels.block_layout import (
    CLEAN,
    NOISY,
    BlockLayout,
    block_index,
    both_halves,
    half_layout,
)

TOLERANCE = 1e-4  # of a logit; their standard deviation is 4

EXAMPLES = f"""
examples:
  llada2 verify tests/goldens/llada2_tiny
  llada2 verify checkpoints/mini --goldens mini-goldens.npz

It passes if every logit is within {TOLERANCE:g} and every generated sequence and its count of
denoising forwards are equal. Status 1 also says that it does not.

{EXIT_STATUS}"""

# What numpy and zipfile raise for a file that is none of theirs, or was damaged.
DAMAGE = (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, RuntimeError, MemoryError)

Goldens = Mapping[str, np.ndarray]


class Result(NamedTuple):
    """One case. A field is None where the case does not have it; problem: "" or what differs."""

    case: str
    max_difference: float | None = None
    tokens_equal: bool | None = None
    forwards_equal: bool | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        # Written so that a NaN does not pass.
        close = self.max_difference is None or self.max_difference <= TOLERANCE
        return close and self.tokens_equal is not False and self.forwards_equal is not False


Runner = Callable[[ModelBundle, Goldens, str], Result]


def verify(checkpoint: Path, goldens: Path | None = None) -> list[Result]:
    """Runs every case of the goldens on the checkpoint.

    checkpoint: a Hugging Face folder or a checkpoint of ours. goldens: default
    checkpoint/goldens.npz.
    Raises: CheckpointError for a checkpoint or goldens that cannot be used.
    """
    numbers = read_goldens(goldens or Path(checkpoint) / "goldens.npz")
    mask_id, eos_id = (_id(numbers, f"{name}_token_id") for name in ("mask", "eos"))
    bundle = load_model(checkpoint, mask_id=mask_id, dtype="float32", param_dtype="float32")
    if bundle.special.eos != eos_id:
        raise CheckpointError(
            f"the goldens' eos_token_id is {eos_id}, the checkpoint's is {bundle.special.eos}: "
            "they do not belong together"
        )
    with jax.default_matmul_precision("highest"):
        cases = [(case, _runner(case)) for case in case_names(numbers)]
        return [_run(run, bundle, numbers, case) for case, run in progress.bar(cases, "cases")]


def read_goldens(path: Path) -> dict[str, np.ndarray]:
    """Raises: CheckpointError for a file that is absent, damaged, or has no case."""
    try:
        numbers = _read_npz(Path(path))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; name the goldens by --goldens") from None
    except DAMAGE as error:
        reason = str(error) or type(error).__name__
        raise CheckpointError(f"{path} is no usable .npz file: {reason}") from None
    if not case_names(numbers):
        raise CheckpointError(f"{path} has no case: nothing would be verified")
    return numbers


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    with path.open("rb") as stream:  # given the path, numpy leaves it open where it fails
        file = np.load(stream)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise ValueError("it holds one array, as .npy files do: save goldens by numpy.savez")
        with file:
            return dict(file)


def case_names(goldens: Goldens) -> list[str]:
    """full, causal, bd*, gen*, eos* as the file has them, in that order."""
    order = ("full", "causal", "bd", "gen", "eos")

    def key(case: str) -> tuple[int, int]:
        found = re.fullmatch(r"(\D+)(\d{0,9})", case)
        kind, number = found.groups() if found else (case, "")
        return (order.index(kind) if kind in order else len(order), int(number or 0))

    return sorted({name.split("/")[0] for name in goldens if "/" in name}, key=key)


def _number(goldens: Goldens, name: str) -> np.ndarray:
    if name not in goldens:
        raise CheckpointError(f"the goldens lack {name}")
    return goldens[name]


def _id(goldens: Goldens, name: str) -> int:
    value = _number(goldens, name)
    if value.size != 1 or not np.issubdtype(value.dtype, np.integer):
        raise CheckpointError(f"the goldens' {name} is {value.dtype}{list(value.shape)}, not an id")
    return int(value.item())


def _runner(case: str) -> Runner:
    for pattern, run in (
        ("full|causal|bd[1-9][0-9]{0,8}", _logits),
        ("(gen|eos)[0-9]{1,9}", _generation),
    ):
        if re.fullmatch(pattern, case):
            return run
    raise CheckpointError(f"the goldens have a case {case!r}, which this program cannot run")


def _run(run: Runner, bundle: ModelBundle, goldens: Goldens, case: str) -> Result:
    try:
        return run(bundle, goldens, case)
    except UserError:
        raise
    except (ValueError, TypeError, OverflowError) as error:  # arrays of another shape or dtype
        raise CheckpointError(f"the goldens' case {case} cannot be run: {error}") from error


# ---- logits --------------------------------------------------------------------------------------


def _logits(bundle: ModelBundle, goldens: Goldens, case: str) -> Result:
    ids, positions, layout = _inputs(goldens, case)
    vocab = bundle.config.vocab_size
    if ids.min() < 0 or ids.max() >= vocab:
        raise CheckpointError(f"{case}: an id lies outside the vocabulary of {vocab}")
    want = _number(goldens, f"{case}/logits").reshape(*ids.shape, -1)
    got = np.asarray(_forward(bundle.config, bundle.params, ids, positions, layout))
    if got.shape != want.shape:
        raise CheckpointError(f"{case}/logits has shape {want.shape}, the model gives {got.shape}")
    difference = np.abs(got - want)
    worst = float(difference.max())  # NaN if there is one
    if worst <= TOLERANCE:
        return Result(case, worst)
    row, position, token = np.unravel_index(np.argmax(difference), difference.shape)
    place = f"row {row}, position {position}, token {token}"
    beyond = int((~(difference <= TOLERANCE)).sum())
    return Result(case, worst, problem=f"{beyond} logits differ, most at {place}")


def _inputs(goldens: Goldens, case: str) -> tuple[jax.Array, jax.Array, BlockLayout]:
    """Token ids, positions and who sees whom, for a forward of [batch, T]."""
    if case in ("full", "causal"):
        ids = _ids(goldens, "full/input_ids")
        positions = _positions(ids)
        one = jnp.ones_like(ids)
        if case == "full":  # one block, one half: every position sees every other
            return ids, positions, half_layout(jnp.zeros_like(ids), one, NOISY)
        return ids, positions, half_layout(block_index(positions, 1, "row"), one, CLEAN)
    noisy, clean = (_ids(goldens, f"{case}/{half}_ids")[None] for half in ("noisy", "clean"))
    segments = _ids(goldens, f"{case}/segment_ids")[None] + 1  # ours count from 1: 0 is padding
    positions = _positions(noisy)
    blocks = block_index(positions, int(case.removeprefix("bd")), "row")
    ids, twice = jnp.concatenate([noisy, clean], 1), jnp.concatenate([positions, positions], 1)
    return ids, twice, both_halves(blocks, segments)


def _ids(goldens: Goldens, name: str) -> jax.Array:
    return jnp.asarray(_number(goldens, name), jnp.int32)


def _positions(ids: jax.Array) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    cfg: ModelConfig, params: Params, ids: jax.Array, positions: jax.Array, layout: BlockLayout
) -> jax.Array:
    model = merge_params(cfg, params)
    return model.logits(model(ids, positions, layout).hidden)


# ---- generation ----------------------------------------------------------------------------------


def _generation(bundle: ModelBundle, goldens: Goldens, case: str) -> Result:
    source = f"gen{case.removeprefix('eos')}" if case.startswith("eos") else case
    # eos* repeats gen*'s request with another end-of-text token; it may leave the request out.
    own = all(f"{case}/{name}" in goldens for name in ("prompt_ids", "params"))
    prompt, params = (
        _number(goldens, f"{case if own else source}/{name}") for name in ("prompt_ids", "params")
    )
    eos_name = f"{case}/eos_token_id" if case.startswith("eos") else "eos_token_id"
    special = dataclasses.replace(bundle.special, eos=_id(goldens, eos_name))
    tokens, forwards = _generate(bundle, prompt.tolist(), special, params)
    want = [int(token) for token in _number(goldens, f"{case}/output_ids")]
    want_forwards = int(_number(goldens, f"{case}/forward_calls"))
    problems = [_first_difference(tokens, want)] if tokens != want else []
    if forwards != want_forwards:
        problems.append(f"{forwards} forwards, not {want_forwards}")
    return Result(
        case,
        tokens_equal=tokens == want,
        forwards_equal=forwards == want_forwards,
        problem="; ".join(problems),
    )


def _generate(
    bundle: ModelBundle, prompt: list[int], special: SpecialTokens, params: np.ndarray
) -> tuple[list[int], int]:
    """The generated ids and the count of denoising forwards."""
    block_size, steps, length, threshold, early = params.tolist()
    options = SamplerOptions(
        max_new_tokens=int(length),
        block_size=int(block_size),
        steps=int(steps),
        threshold=threshold,
        early_stop=bool(early),
    )
    out = generate_tokens(bundle.config, bundle.params, [prompt], special, options)
    return [int(token) for token in out.tokens[0]], int(out.denoise_forwards[0])


def _first_difference(got: list[int], want: list[int]) -> str:
    for at, (a, b) in enumerate(zip(got, want, strict=False)):
        if a != b:
            return f"token {at} is {a}, not {b}"
    return f"{len(got)} tokens, not {len(want)}"


# ---- the command ---------------------------------------------------------------------------------


def table(results: list[Result]) -> str:
    """The results as a table; what differs stands at the end of its line."""
    lines = [
        f"{'case':<8}{'max |Δ logit|':>14}  {'tokens equal':>12}  {'denoising forwards equal':>24}"
    ]
    for result in results:
        difference = "" if result.max_difference is None else f"{result.max_difference:.2e}"
        line = f"{result.case:<8}{difference:>14}  {_word(result.tokens_equal):>12}"
        line += f"  {_word(result.forwards_equal):>24}"
        lines.append((line if result.passed else f"{line}  FAILED: {result.problem}").rstrip())
    return "\n".join(lines)


def _word(value: bool | None) -> str:
    return "" if value is None else "yes" if value else "NO"


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="llada2 verify",
        description="Compare a checkpoint's logits and generations with golden numbers of the "
        "released model file, in fp32.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "checkpoint",
        type=Path,
        metavar="CHECKPOINT",
        help="a Hugging Face folder or a checkpoint of ours",
    )
    p.add_argument("--goldens", type=Path, metavar="FILE", help="default: CHECKPOINT/goldens.npz")
    return p


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    args = parser().parse_args(argv)
    results = verify(args.checkpoint, args.goldens)
    print(table(results))
    failed = [result.case for result in results if not result.passed]
    if failed:
        print(f"{len(failed)} of {len(results)} cases FAILED: {', '.join(failed)}")
        return 1
    print(f"all {len(results)} cases passed (tolerance {TOLERANCE:g})")
    return 0
