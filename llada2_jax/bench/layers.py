"""A stack of LLaDA2's layers in training, ours beside PyTorch's, on the accelerator at hand.

Each contender runs in a process of its own, one after the other, so that the memory of one is free
for the next and its peak is its own; this process never touches the accelerator. A process gets a
job, JSON of a `Job`, and answers in JSON.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada2_jax.architectures import ARCHITECTURES
from llada2_jax.costs import TRAINING, forward_flops
from llada2_jax.errors import UsageError, UserError
from llada2_jax.hardware import GIB
from llada2_jax.inputs import natural, positive
from llada2_jax.remat import POLICIES
from llada2_jax.types import ModelConfig
from pallas_kernels.peaks import peak_flops
from pallas_kernels.tables import Record, print_records

_TOY = ModelConfig(
    vocab_size=1,
    hidden_size=64,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
    intermediate_size=128,
    moe_intermediate_size=32,
    num_experts=16,
    experts_per_token=4,
    n_group=4,
    topk_group=2,
)
MODELS = {"toy": _TOY, **ARCHITECTURES}
"""The toy is what a CPU can train; it says nothing about an accelerator."""

CONTENDERS: dict[str, dict[str, str]] = {
    "jax": {"attention_backend": "auto", "experts_backend": "auto"},
    "jax, tiled experts": {"attention_backend": "auto", "experts_backend": "tiles"},
    "jax, xla attention": {"attention_backend": "xla", "experts_backend": "tiles"},
    "torch": {},
}
"""By name, what is ours to choose of the model; "jax" is the recipe's."""

TOLERANCES = {"float32": 1e-5, "bfloat16": 0.2}
"""Of an array in the Euclidean norm, relative. In bf16 a token near a tie goes to other experts."""

_OPTIMIZER = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.95,
    "eps": 1e-8,
    "weight_decay": 0.1,
    "clip_norm": 0.1,  # of gradients of 0.3 in --check, which is to see the clipping
}


@dataclasses.dataclass(frozen=True)
class Job:
    """What a contender trains. platform: jax's name of the device, "cpu" or "gpu". model: its
    vocabulary is one token, since there is no embedding and no head."""

    platform: str
    model: ModelConfig
    rows: int
    length: int
    block_size: int
    steps: int
    seed: int

    def asked(self, task: str, **files: str) -> dict[str, Any]:
        return {"task": task, "optimizer": _OPTIMIZER, **dataclasses.asdict(self), **files}

    def of(self, contender: str) -> Job:
        return dataclasses.replace(
            self, model=dataclasses.replace(self.model, **CONTENDERS[contender])
        )

    @property
    def flops(self) -> float:
        """Model FLOPs of a step: of all layers, forward and backward, without recomputation."""
        parts = forward_flops(self.model, "bdlm", self.length, self.block_size)
        per_token = sum(count for name, count in parts.items() if name != "head")
        return TRAINING * self.rows * self.length * per_token


class ContenderError(UserError):
    """A contender's process failed; the message is its reason."""


@dataclasses.dataclass(frozen=True)
class Contenders:
    """Starts their processes. torch_python: an interpreter with PyTorch. seconds: that each may
    take."""

    torch_python: str
    seconds: int

    def run(self, name: str, asked: dict[str, Any]) -> dict[str, Any]:
        """The answer of a contender to a job; what it has to say beside goes to stderr.

        Raises: ContenderError.
        """
        here = Path(__file__).parent
        command = [sys.executable, "-m", "llada2_jax.bench.jax_layers"]
        if name == "torch":
            command = [self.torch_python, str(here / "torch_layers.py")]
        with tempfile.TemporaryDirectory() as folder:
            job, answer = Path(folder, "job.json"), Path(folder, "answer.json")
            job.write_text(json.dumps(asked))
            try:
                ended = subprocess.run(
                    [*command, str(job), str(answer)],
                    env=_environment(asked["platform"]),
                    capture_output=True,
                    text=True,
                    errors="replace",
                    timeout=self.seconds,
                )
            except subprocess.TimeoutExpired:
                raise ContenderError(f"not done after {self.seconds} s (--seconds)") from None
            except OSError as error:
                raise ContenderError(str(error)) from None
            sys.stderr.write(ended.stderr)
            if ended.returncode:
                raise ContenderError(_reason(ended.returncode, ended.stderr))
            return json.loads(answer.read_text())


def _environment(platform: str) -> dict[str, str]:
    """XLA gets as much of a GPU as in a run (launch/train.sh)."""
    set_here = {"JAX_PLATFORMS": "cpu"} if platform == "cpu" else {}
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.9", **os.environ, **set_here}


def _reason(status: int, stderr: str) -> str:
    """The line of a traceback that says what was wrong, or the last one."""
    lines = [line for line in stderr.splitlines() if line.strip()]
    errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (errors or lines or [f"it ended with status {status}"])[-1][:200]


# ---- times ---------------------------------------------------------------------------------------


def measure(job: Job, kind: str, names: Sequence[str], contenders: Contenders) -> list[Record]:
    """A record a contender; of one that fails, with the reason. kind: of the device."""
    records = []
    for name in names:
        print(f"{name} ...", file=sys.stderr, flush=True)
        try:
            answer = contenders.run(name, job.of(name).asked("time"))
            records.append({"contender": name, **figures(job, answer, peak_flops(kind))})
        except ContenderError as error:
            records.append({"contender": name, "error": str(error)})
    return records


def figures(job: Job, answer: dict[str, Any], peak: float | None) -> Record:
    """What the table says of a contender's answer. peak: FLOP/s of the device, if known."""
    rate = job.flops / answer["seconds"]
    record = {
        "ms a step": answer["seconds"] * 1e3,
        "tokens/s": round(job.rows * job.length / answer["seconds"]),
        "TFLOP/s": rate / 1e12,
        "MFU %": None if peak is None else 100 * rate / peak,
        "peak GiB": None if answer["peak_bytes"] is None else answer["peak_bytes"] / GIB,
        "first loss": answer["losses"][0],
        "last loss": answer["losses"][1],
    }
    return {name: value for name, value in record.items() if value is not None}


# ---- are they the same layers? -------------------------------------------------------------------


def compare(job: Job, contenders: Contenders) -> list[Record]:
    """Relative difference of each array that both sides make of the same weights and inputs.

    Raises: ContenderError.
    """
    with tempfile.TemporaryDirectory() as folder:
        given = f"{folder}/given.npz"
        for name in ("jax, tiled experts", "torch"):
            found = f"{folder}/{name}.npz"
            contenders.run(name, job.of(name).asked("check", given=given, found=found))
        with np.load(f"{folder}/jax, tiled experts.npz") as ours, np.load(found) as theirs:
            return differences(ours, theirs, TOLERANCES[job.model.dtype])


def differences(ours: Any, theirs: Any, tolerance: float) -> list[Record]:
    """|theirs - ours| / |ours| of every array. Raises: ContenderError if the names differ."""
    if unpaired := set(ours) ^ set(theirs):
        raise ContenderError(f"only one side has {sorted(unpaired)[0]!r}")
    records = []
    for name in sorted(ours):
        error = np.linalg.norm(theirs[name] - ours[name]) / np.linalg.norm(ours[name])
        same = "yes" if error <= tolerance else "NO"  # so that NaN is not
        records.append({"array": name, "differs by": f"{error:.1e}", "same": same})
    return records


# ---- the command ---------------------------------------------------------------------------------


def main(argv: Sequence[str]) -> int:
    """Prints a table. Returns the exit status: 1 if --check finds a difference, or all failed.

    Raises: UsageError, ContenderError.
    """
    args = _parser().parse_args(argv)
    if args.check and args.only:
        raise UsageError("--check compares jax with torch: leave out --only")
    contenders = Contenders(args.torch_python, args.seconds)
    # Asked about what an accelerator would train; a CPU does not say how much memory it has.
    device = contenders.run("jax", _job(args, "", "mini", 4096).asked("size"))
    platform, kind = device["platform"], device["kind"]
    if args.check:
        return _check(args, platform, contenders)
    if args.layers is None and platform != "cpu":
        args.layers = _fitting(device["layers"], args.remat)
    model, length = ("toy", 128) if platform == "cpu" else ("mini", 4096)
    job = _job(args, platform, model, length)
    records = measure(job, kind, args.only or list(CONTENDERS), contenders)
    print_records(
        records,
        as_json=args.json,
        title=f"{kind}: {job.model.num_layers} layers of {args.model or model}, {job.rows} rows of "
        f"2 x {job.length}, block {job.block_size}, {job.model.dtype}, remat {job.model.remat}",
        caption=_caption(platform, peak_flops(kind)),
    )
    return int(all("error" in record for record in records))


def _job(args: argparse.Namespace, platform: str, model: str, length: int) -> Job:
    """Of the options; model and length are what they leave open."""
    cfg = MODELS[args.model or model]
    cfg = dataclasses.replace(
        cfg,
        num_layers=args.layers or cfg.num_layers,
        vocab_size=1,
        tie_word_embeddings=True,
        param_dtype="bfloat16",
        remat=args.remat,
    )
    length = args.length or length
    return Job(platform, cfg, args.rows, length, args.block, args.steps, args.seed)


def _fitting(layers: int | None, remat: str) -> int:
    """As many as are computed to fit. Raises: UsageError where that is none, or not known."""
    if layers is None or remat != "full":
        raise UsageError("--layers: what fits is known for --remat full and a device's own memory")
    if not layers:
        raise UsageError("not even one layer fits: take fewer --rows or a smaller --length")
    return layers


def _caption(platform: str, peak: float | None) -> str:
    if platform == "cpu":
        return "No accelerator here: this says nothing about one."
    known = "" if peak else " Peak of the device unknown."
    return (
        "Forward, backward and update; no embedding, no head. Clean tokens. FLOPs of the model: "
        f"both halves, no recomputation.{known}"
    )


def _check(args: argparse.Namespace, platform: str, contenders: Contenders) -> int:
    """On the CPU in fp32, and on a GPU in bf16 besides, where attention is another function."""
    places = {"cpu": "float32"} | ({} if platform == "cpu" else {platform: "bfloat16"})
    records = []
    for place, dtype in places.items():
        job = _job(args, place, "toy", 128)
        model = dataclasses.replace(job.model, dtype=dtype, param_dtype=dtype)
        try:
            found = compare(dataclasses.replace(job, model=model), contenders)
        except ContenderError as error:  # the other place may still be checked
            found = [{"array": "none", "same": "NO", "error": str(error)}]
        records += [{"on": place, "dtype": dtype, **record} for record in found]
    allowed = ", ".join(f"{limit:g} in {dtype}" for dtype, limit in TOLERANCES.items())
    title = "|torch - jax| / |jax| of the same layers, weights and inputs"
    print_records(records, as_json=args.json, title=title, caption=f"Allowed: {allowed}.")
    return int(any(record["same"] == "NO" for record in records))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m llada2_jax.bench layers",
        description="Forward, backward and AdamW of a stack of layers (the dense first one, then "
        "mixtures of experts) in block diffusion, in bf16 with fp32 moments: this project's and "
        "the same in PyTorch, on the accelerator at hand. Without one: a toy.",
    )
    add = parser.add_argument
    add("--model", choices=MODELS, help="whose layers (mini; CPU: toy)")
    add("--layers", type=positive, metavar="N", help="as many as are computed to fit; CPU: all")
    add("--rows", type=positive, default=2, metavar="N", help="a step (2)")
    add("--length", type=positive, metavar="L", help="clean tokens of a row (4096; CPU: 128)")
    add("--block", type=positive, default=32, metavar="B", help="tokens of a block (32)")
    add("--steps", type=positive, default=10, metavar="N", help="that are timed (10)")
    add("--seed", type=natural, default=0, metavar="N", help="of weights and inputs (0)")
    add("--remat", choices=POLICIES, default="full", help="what to keep for the backward (full)")
    add("--only", nargs="+", choices=CONTENDERS, metavar="NAME", help="these contenders")
    add("--torch-python", default=sys.executable, metavar="PATH", help="an interpreter with torch")
    add("--seconds", type=positive, default=110, metavar="N", help="a contender may take (110)")
    add("--check", action="store_true", help="whether both are the same layers, at a toy shape")
    add("--json", action="store_true", help="records instead of a table")
    return parser
