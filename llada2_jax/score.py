"""`llada2 score`: how many bits a model needs for texts."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from llada2_jax.engine import default_options
from llada2_jax.errors import EXIT_STATUS, UsageError
from llada2_jax.evals.likelihood import ROW_LENGTH, Likelihood, score_texts
from llada2_jax.hub import load_model
from llada2_jax.inputs import (
    InputError,
    Item,
    add_model_options,
    model_arguments,
    positive,
    read_file,
    read_lines_or_stdin,
)

_EXAMPLES = f"""\
examples:
  llada2 score --checkpoint runs/quickstart/merged --file setup.py --file README.md
  llada2 score --checkpoint DIR --text 'import os' --block-size 1     (exact: no sampling)
  llada2 score --checkpoint DIR --texts-file texts.jsonl --samples 32 --json
  cat module.py | llada2 score --checkpoint DIR
  llada2 score --checkpoint AR_DIR --objective ar --file setup.py

For --objective bdlm the figure is an upper bound on -log p, estimated from --samples random masks a
row; ± is the standard error of that estimate. It is exact at block size 1, and for --objective ar.
Bounds at different block sizes are different numbers: compare models at the same one. A text
longer than a row is scored in rows that do not see each other.

{EXIT_STATUS}"""


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return _run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llada2 score",
        description="Bits per byte of texts, with the standard error of the estimate.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    source = parser.add_argument_group("texts").add_mutually_exclusive_group()
    source.add_argument("--text", action="append", help="a text; repeat it for more")
    source.add_argument("--file", action="append", help="a UTF-8 file; repeat it for more")
    source.add_argument(
        "--texts-file",
        metavar="FILE",
        help='JSONL, one {"text": "..."} a line ("-": stdin); with --json the other fields of a '
        "line are passed on. Without a source, stdin is one text",
    )
    scoring = parser.add_argument_group("scoring")
    scoring.add_argument(
        "--objective",
        choices=("bdlm", "ar"),
        default="bdlm",
        help="the block-diffusion bound (default), or left to right for an autoregressive model",
    )
    for name, about in (
        ("block-size", "tokens a block (the checkpoint's, else 32); not for ar"),
        ("samples", "random masks a row (8); not where the result is exact"),
        (
            "row-length",
            "tokens of the longest context (that of the model's training; where the checkpoint "
            f"does not tell, {ROW_LENGTH} or the longest that the model takes, if it is less)",
        ),
    ):
        scoring.add_argument(f"--{name}", type=positive, metavar="N", help=about)
    scoring.add_argument("--json", action="store_true", help="JSONL, the last line the total")
    return parser


def _run(args: argparse.Namespace) -> int:
    _is_exact(args, args.block_size)  # before anything is read
    items = _items(args)
    bundle = load_model(args.checkpoint, **model_arguments(args))
    block_size = args.block_size or default_options(bundle.generation).block_size
    exact = _is_exact(args, block_size)
    samples = 1 if exact else args.samples or 8
    scores = score_texts(
        bundle,
        [item.text for item in items],
        block_size=block_size,
        samples=samples,
        row_length=args.row_length,
        objective=args.objective,
    )
    how = {"objective": args.objective, "samples": samples}
    if args.objective == "bdlm":
        how["block_size"] = block_size
    _write(items, scores, how, sampled=not exact, as_json=args.json)
    return 0


def _is_exact(args: argparse.Namespace, block_size: int | None) -> bool:
    """Whether there is nothing to sample. Raises: UsageError for options without a meaning then."""
    left_to_right = args.objective == "ar"
    if left_to_right and args.block_size is not None:
        raise UsageError("--block-size has no meaning for --objective ar: leave it out")
    exact = left_to_right or block_size == 1
    if exact and args.samples is not None:
        what = "for --objective ar" if left_to_right else "at block size 1, where one draw is exact"
        raise UsageError(f"--samples has no meaning {what}: leave it out")
    return exact


def _items(args: argparse.Namespace) -> list[Item]:
    if args.text is not None:
        items = [Item(f"text {i}", text) for i, text in enumerate(args.text, start=1)]
    elif args.file is not None:
        items = [Item(name, read_file(name)) for name in args.file]
    else:
        items = read_lines_or_stdin(args.texts_file, "text")
    for item in items:
        if not item.text:
            raise InputError(f"{item.name} is empty: there is nothing to score")
    return items


# ------------------------------------------------------------------------------------ output


def total(scores: Sequence[Likelihood]) -> Likelihood:
    """All texts as one; their Monte Carlo errors are independent."""
    return Likelihood(
        nats=sum(s.nats for s in scores),
        nats_stderr=float(np.sqrt(sum(s.nats_stderr**2 for s in scores))),
        tokens=sum(s.tokens for s in scores),
        bytes=sum(s.bytes for s in scores),
    )


def _record(score: Likelihood, *, sampled: bool) -> dict[str, Any]:
    """The figures of a text. An error that cannot be told (one sample) is null."""
    known = not sampled or score.nats_stderr > 0
    return {
        "bits_per_byte": score.bits_per_byte,
        "bits_per_byte_stderr": score.bits_per_byte_stderr if known else None,
        "nats": score.nats,
        "nats_stderr": score.nats_stderr if known else None,
        "tokens": score.tokens,
        "bytes": score.bytes,
    }


def _write(
    items: Sequence[Item],
    scores: Sequence[Likelihood],
    how: dict[str, Any],
    *,
    sampled: bool,
    as_json: bool,
) -> None:
    sampled = sampled and how["samples"] == 1  # only then does a zero mean that nobody knows
    if as_json:
        for item, score in zip(items, scores, strict=True):
            record = {"name": item.name} | _record(score, sampled=sampled) | how
            print(json.dumps(item.fields | record, ensure_ascii=False))
        print(json.dumps({"name": "total"} | _record(total(scores), sampled=sampled) | how))
        return
    what = ", ".join(f"{key.replace('_', ' ')} {value}" for key, value in how.items())
    print(what, file=sys.stderr)
    names = [*(item.name for item in items), "total"]
    width = max(map(len, names))
    print(f"{'':<{width}}  {'bits/byte':>9}  {'±':>7}  {'nats':>12}  {'±':>9}  tokens    bytes")
    for name, score in zip(names, [*scores, total(scores)], strict=True):
        errors = [f"{score.bits_per_byte_stderr:.4f}", f"{score.nats_stderr:.2f}"]
        if sampled:
            errors = ["?", "?"]
        print(
            f"{name:<{width}}  {score.bits_per_byte:9.4f}  {errors[0]:>7}  {score.nats:12.2f}  "
            f"{errors[1]:>9}  {score.tokens:6d}  {score.bytes:7d}"
        )
