"""`llada2 convert`: Hugging Face safetensors <-> Orbax."""

from __future__ import annotations

import argparse
import collections
import json
import re
from pathlib import Path

from llada2_jax import mask_embedding
from llada2_jax.errors import EXIT_STATUS
from llada2_jax.hub.config import MODEL_TYPES
from llada2_jax.hub.names import layer_of
from llada2_jax.hub.streaming import SHARD_BYTES, Options, convert
from llada2_jax.types import DTYPES

EXAMPLES = f"""
examples:
  # A released model, to a checkpoint that every command here reads:
  llada2 convert LLaDA2.0-mini checkpoints/mini

  # An AR model that is to become a block-diffusion one: choose the id that becomes its mask, and
  # start the mask's embedding from the mean of the others:
  llada2 convert Ling-mini-base-2.0 checkpoints/ling --mask-id 156895 --mask-init mean

  # And back, in bfloat16, as LLaDA2:
  llada2 convert runs/mini/merged out/mini-hf --dtype bfloat16 --model-type llada2_moe

Memory holds about one tensor (exports: and 256 MB of chunks), never a model. DST appears when all
of it has been written. Multi-token prediction layers are dropped, and named.

{EXIT_STATUS}"""

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """Bytes of "5GB", "200MB", "1000". Raises: argparse.ArgumentTypeError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]?)B?", text.strip().upper())
    size = float(match[1]) * _UNITS[match[2]] if match else 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 200MB or bytes")
    return int(size)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="llada2 convert",
        description="Convert a model between Hugging Face safetensors and our Orbax checkpoints.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument(
        "src", type=Path, metavar="SRC", help="a Hugging Face folder, a checkpoint, or a run's step"
    )
    p.add_argument("dst", type=Path, metavar="DST", help="the directory to write")
    p.add_argument("--to", choices=("orbax", "hf"), help="default: the other format than SRC's")
    p.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the weights written; default: as they came (exports: as they once came from "
        "Hugging Face). The router's bias keeps its own",
    )
    for name, about in (
        ("mask", "the mask token, where the tokenizer names none"),
        ("eos", "default: from config.json or the tokenizer"),
        ("pad", "default: from config.json or the tokenizer"),
    ):
        p.add_argument(f"--{name}-id", type=int, metavar="ID", help=about)
    p.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="take the tokenizer files of this folder"
    )
    p.add_argument(
        "--mask-init",
        choices=mask_embedding.CHOICES,
        default="keep",
        help="the mask's row in the embedding of an AR model: keep it, the mean of the other rows, "
        "or a normal of their mean and deviation (default: keep)",
    )
    p.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of --mask-init random (default: 0)"
    )
    p.add_argument(
        "--model-type",
        choices=[m for m in MODEL_TYPES if not m.endswith("_veomni")],
        help="of the config.json written (default: the source's)",
    )
    p.add_argument(
        "--shard-size",
        type=parse_size,
        default=SHARD_BYTES,
        metavar="SIZE",
        help="largest *.safetensors file, e.g. 200MB (default: 5GB)",
    )
    p.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    return p


def main(argv: list[str]) -> int:
    """Runs the command; returns the exit status."""
    args = parser().parse_args(argv)
    options = Options(
        to=args.to,
        dtype=args.dtype,
        mask_id=args.mask_id,
        eos_id=args.eos_id,
        pad_id=args.pad_id,
        tokenizer=args.tokenizer,
        mask_init=args.mask_init,
        seed=args.seed,
        model_type=args.model_type,
        shard_bytes=args.shard_size,
        overwrite=args.overwrite,
    )
    report = convert(args.src, args.dst, options)
    dropped = report.pop("dropped_tensors")
    print(json.dumps(report, indent=1))
    if dropped:
        print(f"dropped {len(dropped)} tensors of multi-token prediction layers:")
        for layer, count in sorted(collections.Counter(map(layer_of, dropped)).items()):
            print(f"  model.layers.{layer}.* ({count})")
    print(f"wrote {args.dst}")
    return 0
