"""`llada2 generate`: completes prompts from the command line."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from llada2_jax import progress
from llada2_jax.engine import Completion, Engine, load, tokens_per_second
from llada2_jax.errors import EXIT_STATUS, UsageError
from llada2_jax.inputs import (
    Item,
    add_model_options,
    model_arguments,
    positive,
    read_lines_or_stdin,
)
from llada2_jax.sampler import RequestError, SamplerOptions, tokens_per_forward

_EXAMPLES = f"""\
examples:
  llada2 generate --checkpoint runs/quickstart/merged --prompt 'def fibonacci(n):'
  cat half_a_file.py | llada2 generate --checkpoint DIR --threshold 0.8
  llada2 generate --checkpoint DIR --prompts-file prompts.jsonl > completions.jsonl
  llada2 generate --checkpoint DIR --prompt 'import ' --temperature 0.7 --top-p 0.9 --seed 1

Completions go to stdout, everything else to stderr. A sampling option that is not given has the
checkpoint's default, else the one in brackets.

{EXIT_STATUS}"""

# flag -> (type, what it does); each is a field of SamplerOptions
_OPTIONS = {
    "max-new-tokens": (int, "stop after so many tokens (256)"),
    "block-size": (int, "positions denoised together (32)"),
    "threshold": (float, "accept a token at once if its probability is above this (0.95)"),
    "steps": (int, "finish a block within so many forwards (the block size)"),
    "temperature": (float, "sample at this temperature; 0 is greedy (0)"),
    "top-k": (int, "sample among the k most probable; 0 is off (0)"),
    "top-p": (float, "sample among the most probable that make up p; 1 is off (1)"),
    "min-p": (float, "drop what has less than this times the highest probability; 0 is off (0)"),
    "seed": (int, "the same seed gives the same text (0)"),
    "edit-threshold": (float, "replace a generated token by one more probable than this (never)"),
    "edit-budget": (int, "forwards a block may take for edits after its last mask (16)"),
}
_SWITCHES = {
    "stop-on-eos": "end a completion with its first EOS (on)",
    "early-stop": "end it as soon as all before the EOS is accepted, inside the block (off)",
    "fuse-commit": "commit a block in the next one's first forward, not in one of its own (off)",
}
_METAVARS = {int: "N", float: "X"}


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    return _run(_parser().parse_args(argv))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llada2 generate",
        description="Complete prompts with the block-diffusion threshold sampler.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model_options(parser)
    source = parser.add_argument_group("prompts").add_mutually_exclusive_group()
    source.add_argument(
        "--prompt", action="append", metavar="TEXT", help="a prompt; repeat it for more"
    )
    source.add_argument(
        "--prompts-file",
        metavar="FILE",
        help='JSONL, one {"prompt": "..."} a line ("-": stdin), answered as JSONL; other fields of '
        "a line are passed on. With neither option, stdin is one prompt",
    )
    sampling = parser.add_argument_group("sampling")
    for flag, (kind, about) in _OPTIONS.items():
        sampling.add_argument(f"--{flag}", type=kind, metavar=_METAVARS[kind], help=about)
    for flag, about in _SWITCHES.items():
        sampling.add_argument(
            f"--{flag}", action=argparse.BooleanOptionalAction, default=None, help=about
        )
    output = parser.add_argument_group("output")
    output.add_argument("--json", action="store_true", help="answer as JSONL, with counts")
    output.add_argument(
        "--no-stream", action="store_true", help="decode in batches, print when all are done"
    )
    output.add_argument(
        "--max-batch",
        type=positive,
        default=8,
        metavar="N",
        help="prompts decoded together, unless streamed (8)",
    )
    output.add_argument(
        "--compare-uncached",
        action="store_true",
        help="decode once more without a KV cache and report the ratio of the times",
    )
    return parser


def _run(args: argparse.Namespace) -> int:
    options = _options(args)
    items = _items(args)
    engine = load(args.checkpoint, max_batch=args.max_batch, **model_arguments(args))
    as_json = args.json or args.prompts_file is not None
    if as_json or args.no_stream:
        completions = _generate(engine, items, options)
        _write(items, completions, as_json)
    else:
        completions = [_stream(engine, items, row, options) for row in range(len(items))]
    _report(completions)
    if args.compare_uncached:
        _compare(engine, items, completions, options)
    return 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """The sampling options that were given."""
    names = [flag.replace("-", "_") for flag in (*_OPTIONS, *_SWITCHES)]
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    try:
        SamplerOptions(**given)
    except RequestError as error:
        raise UsageError(str(error)) from error
    return given


def _items(args: argparse.Namespace) -> list[Item]:
    if args.prompt is not None:
        return [Item("--prompt", text) for text in args.prompt]
    return read_lines_or_stdin(args.prompts_file, "prompt")


def _generate(engine: Engine, items: Sequence[Item], options: dict[str, Any]) -> list[Completion]:
    with progress.bar(what="completions", total=len(items), unit="prompt") as bar:
        return engine.generate([item.text for item in items], progress=bar.update, **options)


# ------------------------------------------------------------------------------------ output


def _stream(engine: Engine, items: Sequence[Item], row: int, options: dict[str, Any]) -> Completion:
    prompt = items[row].text
    if len(items) > 1:
        print(f"=== {prompt!r}")
    for piece in engine.stream(prompt, row_id=row, **options):
        if isinstance(piece, Completion):
            print()
            return piece
        print(piece, end="", flush=True)
    raise AssertionError("a stream ends with its Completion")


def _write(items: Sequence[Item], completions: Sequence[Completion], as_json: bool) -> None:
    for item, completion in zip(items, completions, strict=True):
        if as_json:
            record = item.fields | {"prompt": item.text} | _record(completion)
            print(json.dumps(record, ensure_ascii=False))
            continue
        if len(items) > 1:
            print(f"=== {item.text!r}")
        print(completion.text)


def _record(c: Completion) -> dict[str, Any]:
    return {
        "completion": c.text,
        "tokens": c.tokens,
        "finish_reason": c.finish_reason,
        "prompt_tokens": len(c.prompt_tokens),
        "accepted": c.accepted,
        "edits": c.edits,
        "denoise_forwards": c.denoise_forwards,
        "commit_forwards": c.commit_forwards,
        "tokens_per_forward": round(c.tokens_per_forward, 4),
        "tokens_per_forward_with_commits": round(c.tokens_per_forward_with_commits, 4),
        "seconds": round(c.seconds, 4),
    }


def _report(completions: Sequence[Completion]) -> None:
    tokens = sum(len(c.tokens) for c in completions)
    denoise = sum(c.denoise_forwards for c in completions)
    commits = sum(c.commit_forwards for c in completions)
    seconds = sum(c.seconds for c in completions)
    building = sum(c.compile_seconds for c in completions)
    print(
        f"{tokens} tokens in {seconds:.2f} s: {tokens_per_second(completions):.1f} tokens/s; "
        f"{tokens_per_forward(*completions):.2f} tokens per forward, "
        f"{tokens_per_forward(*completions, commits=True):.2f} with commits "
        f"({denoise} denoising + {commits} commit forwards); compiled for {building:.1f} s",
        file=sys.stderr,
    )


def _compare(engine: Engine, items, completions, options: dict[str, Any]) -> None:
    uncached = _generate(engine, items, options | {"cache": False})
    cached_s, uncached_s = (sum(c.seconds for c in cs) for cs in (completions, uncached))
    equal = all(a.tokens == b.tokens for a, b in zip(completions, uncached, strict=True))
    print(
        f"without a cache: {uncached_s:.2f} s, {uncached_s / max(cached_s, 1e-9):.2f} times as "
        f"long; the same tokens: {'yes' if equal else 'NO'}",
        file=sys.stderr,
    )
