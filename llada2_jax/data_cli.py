"""`llada2 data prepare | inspect | bench`: sources into shards, and what rows come of them."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from llada2_jax import progress
from llada2_jax.checkpoint import CheckpointError
from llada2_jax.config import DataConfig
from llada2_jax.config_check import CHOICES
from llada2_jax.data import inspect as packed
from llada2_jax.data.bench import measure
from llada2_jax.data.corpus import Corpus, load_corpus
from llada2_jax.data.encoders import CONTENTS, EncodeOptions
from llada2_jax.data.examples import BAD_ROW_KINDS
from llada2_jax.data.prepare import Job, prepare
from llada2_jax.data.prepared import prepared_tokenizer, read_manifest
from llada2_jax.data.sources import FORMATS, SourceSpec, Unit
from llada2_jax.data.tokenizer import vocab_size
from llada2_jax.errors import EXIT_STATUS, UsageError, UserError
from llada2_jax.folders import is_checkpoint, is_hf_folder, is_run
from llada2_jax.hub import load_bundle
from llada2_jax.hub.config import special_tokens
from llada2_jax.hub.huggingface import read_tokenizer_files
from llada2_jax.inputs import natural, positive
from llada2_jax.types import SpecialTokens

_EXAMPLES = f"""\
examples:
  llada2 data prepare /data/web data/web --tokenizer LLaDA2.0-mini
  llada2 data prepare 'gs://bucket/code/*.jsonl.zst' data/code --tokenizer DIR --field content
  llada2 data prepare chats.jsonl data/sft --tokenizer DIR --content chat --loss-turns last
  llada2 data prepare pairs.parquet data/dpo --tokenizer DIR --content preference
  llada2 data prepare my_tasks:mixture data/mix --tokenizer DIR --format seqio \\
      --content tokens --prompt-field inputs --field targets
  llada2 data inspect data/sft --packing best_fit --row-length 1024 --block-size 32
  llada2 data bench data/web --row-length 4096

A prepared folder goes into a config as data.sources = ("data/web", "data/code"), with a share of
rows for each in data.weights. Stopped or killed, prepare goes on where it was when run again.

{EXIT_STATUS}"""


def main(argv: list[str]) -> int:
    """`llada2 data`; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except UserError:
        raise
    except ValueError as error:  # of a corpus, or of a library that reads somebody's format
        raise UserError(str(error)) from error
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="llada2 data",
        description="Turns sources into tokenized shards, and shows the rows made of them.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add_prepare(commands.add_parser("prepare", help="tokenize a source, once, into shards"))
    _add_inspect(commands.add_parser("inspect", help="show rows as they are packed"))
    _add_bench(commands.add_parser("bench", help="measure how fast rows come"))
    return parser


# ------------------------------------------------------------------------------------ prepare


def _add_prepare(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_prepare)
    parser.add_argument("source", help="file, folder, 'glob', gs:// path, or MODULE:TASK of seqio")
    parser.add_argument("output", help="folder to write; one that is unfinished is finished")
    parser.add_argument(
        "--tokenizer", required=True, metavar="DIR", help="a model's folder, or one of its files"
    )
    for name in ("mask", "eos", "pad"):
        about = f"the {name} token's id, where the files do not say"
        parser.add_argument(f"--{name}-id", type=int, metavar="ID", help=about)

    reading = parser.add_argument_group("reading")
    reading.add_argument(
        "--format", choices=("auto", *FORMATS), default="auto", help="(by the files' names)"
    )
    reading.add_argument("--pattern", default="", help="names taken from a folder, e.g. '*.py'")
    reading.add_argument(
        "--records", choices=("json", "text"), default="json", help="what ArrayRecord files hold"
    )
    reading.add_argument("--split", default="train", help="of a DatasetDict or seqio task")
    reading.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.001,
        metavar="X",
        help="share of rows that may be bad; they are skipped and counted (0.001)",
    )

    meaning = parser.add_argument_group("what rows mean")
    meaning.add_argument(
        "--content", choices=CONTENTS, default="text", help="what a row holds (text)"
    )
    meaning.add_argument("--field", default="", help="a row's field that holds the text or the ids")
    meaning.add_argument(
        "--prompt-field",
        default="",
        help="a row's field that holds what stands before it and is not learned (of pairs: prompt)",
    )
    meaning.add_argument(
        "--template",
        default="tokenizer",
        help="chat template: the tokenizer's, 'llada2' (built in), or a Jinja file",
    )
    meaning.add_argument("--today", default="", help="date for templates that write one, ISO")
    meaning.add_argument(
        "--loss-turns", choices=("all", "last"), default="all", help="assistant turns to learn"
    )
    meaning.add_argument("--system", default="", help="system prompt for chats without one")
    meaning.add_argument("--no-bos", action="store_true", help="do not open texts with bos")
    meaning.add_argument(
        "--row-length",
        type=positive,
        default=0,
        metavar="N",
        help="refuse rows whose prompt (of pairs: twice) fills a row of N tokens",
    )

    writing = parser.add_argument_group("writing")
    writing.add_argument(
        "--validation-percent", type=float, default=2.0, metavar="X", help="of the rows (2)"
    )
    writing.add_argument(
        "--retry-seconds",
        type=float,
        default=60.0,
        metavar="S",
        help="how long to try again what storage refuses (60)",
    )
    writing.add_argument("--processes", type=positive, default=0, metavar="N", help="(one a core)")
    writing.add_argument("--overwrite", action="store_true", help="start again")


def _prepare(args: argparse.Namespace) -> None:
    files, special = load_tokenizer(args.tokenizer, args.mask_id, args.eos_id, args.pad_id)
    template = args.template
    if template not in ("tokenizer", "llada2"):
        template = Path(template).read_text(encoding="utf-8")
    job = Job(
        SourceSpec(args.source, args.format, args.pattern, args.records, args.split),
        EncodeOptions(
            args.content,
            args.field,
            args.prompt_field,
            template,
            args.today,
            args.loss_turns,
            args.system,
            not args.no_bos,
            args.row_length,
        ),
        files,
        special,
        args.max_bad_fraction,
        args.validation_percent,
        args.retry_seconds,
    )
    manifest = prepare(
        job,
        args.output,
        processes=args.processes,
        overwrite=args.overwrite,
        progress=_progress,
    )
    print(_summary(manifest))


def load_tokenizer(
    folder: str, mask_id: int | None, eos_id: int | None, pad_id: int | None
) -> tuple[dict[str, str], SpecialTokens]:
    """A tokenizer's files and special ids, from a model's folder or one with the files alone.

    Raises: CheckpointError.
    """
    path = Path(folder)
    if is_checkpoint(path) or is_hf_folder(path) or is_run(path):
        bundle = load_bundle(path, mask_id=mask_id, eos_id=eos_id, pad_id=pad_id)
        files, special = bundle.tokenizer_files, bundle.special
    else:
        files, special = read_tokenizer_files(path), None
    if "tokenizer.json" not in files:
        raise CheckpointError(f"--tokenizer {folder}: it holds no tokenizer.json")
    try:
        size = vocab_size(Tokenizer.from_str(files["tokenizer.json"]))
    except Exception as error:  # tokenizers raises Exception itself
        raise CheckpointError(f"{folder}: tokenizer.json cannot be read: {error}") from None
    if special is None:
        special = special_tokens(
            {"vocab_size": size}, files, mask_id=mask_id, eos_id=eos_id, pad_id=pad_id
        )
    return files, special


def _progress(units: list[Unit], reports: Iterator[dict]) -> Iterator[dict]:
    """A bar over the size of the units, with tokens and bad rows beside it."""
    tokens = bad = 0
    total = sum(u.size for u in units)
    with progress.bar(what="preparing", total=total, unit="B") as bar:
        for report in reports:
            tokens += sum(s["tokens"] for s in report["splits"].values())
            bad += sum(report["bad"].values())
            bar.set_postfix(tokens=f"{tokens:.3g}", bad=bad, refresh=False)
            bar.update(report["size"])
            yield report


def _summary(manifest: dict[str, Any]) -> str:
    lines = []
    for split, total in manifest["splits"].items():
        lines.append(
            f"{split:<11} {total['documents']:>12,} documents {total['tokens']:>16,} tokens "
            f"({total['supervised_tokens']:,} supervised, longest {total['longest']:,})"
        )
    files, rows = manifest["files"], manifest["rows"]
    if files:
        such = f" (such as {_shown(files['example'])})" if files["left_out"] else ""
        lines.append(
            f"{files['read']:,} files of format {manifest['source']['format']} read, "
            f"{files['left_out']:,} left out{such}"
        )
    bad = sum(rows["bad"].values())
    lines.append(f"{rows['read']:,} rows read, {bad:,} bad")
    lines += [f"  {n:,} {kind}: {BAD_ROW_KINDS[kind]}" for kind, n in rows["bad"].items()]
    return "\n".join(lines)


def _shown(path: str) -> str:
    """A path that can be printed, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode(errors="backslashreplace")


# ----------------------------------------------------------------------------- inspect, bench


def _add_rows(parser: argparse.ArgumentParser) -> None:
    """Options that name prepared folders and how rows are made of them."""
    default = DataConfig()
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="prepared folders")
    parser.add_argument(
        "--weights",
        type=_numbers,
        default=(),
        metavar="W,W",
        help="share of rows of each (as many as it fills)",
    )
    parser.add_argument(
        "--row-length", type=positive, default=1024, metavar="N", help="tokens (1024)"
    )
    parser.add_argument(
        "--packing", choices=CHOICES["data.packing"], help="(best_fit for chats and pairs)"
    )
    parser.add_argument(
        "--pad-multiple",
        type=positive,
        default=default.pad_multiple,
        metavar="N",
        help=f"tokens that best_fit rounds documents up to ({default.pad_multiple})",
    )
    parser.add_argument(
        "--long-documents",
        choices=CHOICES["data.long_documents"],
        default="skip",
        help="what becomes of documents beyond a row under best_fit (skip)",
    )
    parser.add_argument("--seed", type=natural, default=0, help="of the order of rows (0)")


def _numbers(text: str) -> tuple[float, ...]:
    return tuple(map(float, text.split(",")))


def _corpus(args: argparse.Namespace) -> tuple[Corpus, DataConfig, Tokenizer]:
    manifest = read_manifest(args.folders[0])
    conversation = manifest["encode"]["content"] in ("chat", "preference")
    if len(args.weights) not in (0, len(args.folders)) or not all(w > 0 for w in args.weights):
        raise UsageError(f"--weights {args.weights}: one positive number for each folder")
    cfg = DataConfig(
        sources=tuple(args.folders),
        weights=args.weights,
        packing=args.packing or ("best_fit" if conversation else "concat"),
        pad_multiple=args.pad_multiple,
        long_documents=args.long_documents,
        row_length=args.row_length,
    )
    tokenizer = prepared_tokenizer(args.folders[0])
    corpus = load_corpus(cfg, tokenizer, SpecialTokens(**manifest["special"]))
    return corpus, cfg, tokenizer


def _add_inspect(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_inspect)
    _add_rows(parser)
    parser.add_argument("--row", type=natural, default=0, metavar="N", help="the first one shown")
    parser.add_argument("--rows", type=positive, default=1, metavar="N", help="how many")
    parser.add_argument("--block-size", type=positive, default=32, metavar="N", help="shown (32)")
    parser.add_argument("--html", metavar="FILE", help="write a page instead")
    parser.add_argument("--no-color", action="store_true", help="marks instead of colours")


def _inspect(args: argparse.Namespace) -> None:
    corpus, cfg, tokenizer = _corpus(args)
    print(_report(corpus, cfg))
    rows = corpus.training_rows(cfg, args.row + args.rows, args.seed)
    shown = [(i, rows[i]) for i in range(args.row, args.row + args.rows)]
    titled = [
        (f"row {i}: {packed.describe(row)}", list(packed.runs(row, tokenizer, args.block_size)))
        for i, row in shown
    ]
    if args.html:
        Path(args.html).write_text(packed.as_html(titled), encoding="utf-8")
        print(f"wrote {args.html}")
        return
    draw = packed.as_text if args.no_color or not sys.stdout.isatty() else packed.as_ansi
    for title, pieces in titled:
        print(f"\n{title}\n{draw(iter(pieces))}")


def _report(corpus: Corpus, cfg: DataConfig) -> str:
    lines = []
    for name, values in corpus.report(cfg).items():
        parts = [f"{values['documents']:,} documents", f"{values['rows']:,} rows an epoch"]
        parts += [f"{values['fill']:.2%} full", f"{values['share']:.1%} of the rows"]
        parts += [f"{values[k]:,} {k}" for k in ("skipped", "split", "unsupervised") if k in values]
        lines.append(f"{name}: {', '.join(parts)}")
    return "\n".join(lines)


def _add_bench(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_bench)
    _add_rows(parser)
    parser.add_argument(
        "--rows-per-step", type=positive, default=32, metavar="N", help="rows of a batch (32)"
    )
    parser.add_argument(
        "--seconds", type=float, default=5.0, metavar="S", help="how long to measure (5)"
    )


def _bench(args: argparse.Namespace) -> None:
    if not args.seconds > 0:
        raise UsageError(f"--seconds {args.seconds}: must be above 0")
    corpus, cfg, _ = _corpus(args)
    print(_report(corpus, cfg))
    result = measure(
        corpus.training_rows(cfg, 1 << 40, args.seed),
        row_length=cfg.row_length,
        rows_per_step=args.rows_per_step,
        seconds=args.seconds,
    )
    print(json.dumps({k: round(v, 3) for k, v in result.items()}))
