"""`llada2 quickstart`: corpus, parent, conversion, merge, generation and a report, in one command.

It is the template of every larger run: each stage is one call that any user can make alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tokenizers import Tokenizer

from llada2_jax import progress, quickstart_report
from llada2_jax.assets import TINY_AR
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import TrainConfig, validate
from llada2_jax.data.corpus import Corpus, load_corpus
from llada2_jax.data.documents import Document, documents
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.engine import Completion, Engine
from llada2_jax.errors import EXIT_STATUS, UsageError
from llada2_jax.evals.likelihood import left_to_right_nll, tokenizer_of, validation_contexts
from llada2_jax.folders import is_checkpoint
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.hub.streaming import Options, convert
from llada2_jax.merge import merge_checkpoints, select_best
from llada2_jax.metrics import read_metrics
from llada2_jax.sampler import compile_count, tokens_per_forward
from llada2_jax.train import parse_flags, train
from llada2_jax.train_step import RowScores, make_eval_step, score_rows
from llada2_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """eval_rows, eval_samples: validation rows and Monte Carlo draws of the final figures.
    exact_rows: rows of the check of the bound at block size 1. prompts, prompt_tokens,
    max_new_tokens: completions of held-out functions. rounds: timings of each threshold, in turns;
    the median counts. speed_tokens: length of the speed test."""

    eval_rows: int
    eval_samples: int
    block_sizes: tuple[int, ...]
    exact_rows: int
    prompts: int
    prompt_tokens: int
    max_new_tokens: int
    thresholds: tuple[float, ...]
    rounds: int
    speed_tokens: int


TARGET_BLOCK_SIZE = 32
"""What the conversion decodes with (§5.4)."""


def say(text: str) -> None:
    """A stage's headline."""
    print(f"\n== {text}", flush=True)


def run(config: Any) -> Path:
    """The pipeline; returns the report's path. Stages that a workdir holds already are resumed.

    config: a ConfigDict as configs/quickstart.py gives it; its fields have no static types.
    """
    started = time.perf_counter()
    work = Path(config.workdir)
    report = ReportConfig(**config.report.to_dict())
    results: dict[str, Any] = {"config": _plain(config)}
    if config.train_parent:
        _train_parent(config, work)
    say("corpus: the Python standard library's own source")
    corpus = _corpus(config)
    results["corpus"] = _describe_corpus(corpus)
    print(results["corpus"])

    say("the autoregressive parent, continued briefly")
    ar_cfg = _placed(config.ar, work / "ar")
    ar = train(ar_cfg, corpus=corpus)
    say("conversion: warmup, stable, decay")
    conversion_cfg = _placed(config.conversion, work / "conversion")
    train(conversion_cfg, corpus=corpus)
    say("merge of the best checkpoints of the last phase")
    best, merged = _merge(work, config.merge_top_k, results)
    say("bits per byte")
    _measure_likelihood(results, report, corpus, conversion_cfg, ar, best, merged)
    say("completions of held-out functions")
    _measure_generation(results, report, conversion_cfg, merged)
    say("speed")
    _measure_speed(results, report, conversion_cfg, merged)
    results["runs"] = {name: read_metrics(work / name) for name in ("parent", "ar", "conversion")}
    results["seconds"] = time.perf_counter() - started
    path = quickstart_report.write(work, results)
    say(f"done in {results['seconds'] / 60:.1f} minutes: {path}")
    return path


def _plain(config: ml_collections.ConfigDict) -> dict:
    """The config without what the run does not use."""
    unused = () if config.train_parent else ("parent",)
    return {k: v for k, v in config.to_dict().items() if k not in unused}


def _placed(config: ml_collections.ConfigDict, workdir: Path) -> TrainConfig:
    config = config.copy_and_resolve_references()
    config.workdir = str(workdir)
    return validate(config)


def _train_parent(config, work: Path) -> None:
    """Stage 1 of the long run: tokenizer, parent, and the checkpoint that ships."""
    say("tokenizer and autoregressive parent, from scratch")
    folder = work / "tokenizer"
    if not folder.exists():
        texts = (d.text for d in documents(config.parent.data.source, "train"))
        tokenizer = train_tokenizer(texts, config.parent.model.vocab_size)
        partial = folder.with_name(".tokenizer.tmp")  # so that the folder is there whole or not
        partial.mkdir(parents=True, exist_ok=True)
        for name, text in tokenizer_files(tokenizer).items():
            (partial / name).write_text(text)
        partial.rename(folder)
    parent = config.parent.copy_and_resolve_references()
    parent.data.tokenizer = str(folder)
    cfg = _placed(parent, work / "parent")
    last = work / "parent" / "checkpoints" / str(cfg.total_steps)
    if not is_checkpoint(last):
        train(cfg)
    convert(last, TINY_AR, Options(to="hf", dtype="bfloat16", overwrite=True))


def _corpus(config) -> Corpus:
    bundle = load_bundle(config.conversion.init.checkpoint)
    data = validate(config.conversion).data
    return load_corpus(data, tokenizer_of(bundle), bundle.special)


def _describe_corpus(corpus: Corpus) -> dict[str, Any]:
    def split(part):
        texts = (part.read(i, 0, int(n))[0] for i, n in enumerate(part.lengths))
        return {
            "documents": len(part.ids),
            "tokens": int(part.lengths.sum()),
            "bytes": sum(int(corpus.token_bytes[tokens].sum()) for tokens in texts),
        }

    [source] = corpus.sources
    return {"train": split(source.train), "validation": split(source.validation)}


def _merge(work: Path, top_k: int, results: dict) -> tuple[ModelBundle, ModelBundle]:
    """The best single checkpoint of the last kind, and the mean of the top_k best."""
    selection = select_best(work / "conversion", top_k)
    chosen = [c.path for c in selection.chosen]
    out = work / "merged"
    merge_checkpoints(chosen, out, overwrite=True)
    results["merge"] = {
        "kind": selection.kind,
        "steps": [c.step for c in selection.chosen],
        "bits_per_byte": [c.value for c in selection.chosen],
    }
    print(results["merge"])
    return load_model(chosen[0]), load_model(out)


def _measure_likelihood(
    results, report: ReportConfig, corpus: Corpus, cfg: TrainConfig, ar, best, merged
) -> None:
    """Bits per byte on the same validation bytes: AR, and the diffusion models by block size."""
    batches = corpus.validation_batches(cfg.data, report.eval_rows, 8)

    steps: dict[str, Callable] = {}

    def score(bundle: ModelBundle, objective: str, block_size: int) -> RowScores:
        contexts = validation_contexts(
            block_size, bundle.special.mask, 1 if objective == "ar" else report.eval_samples
        )
        step = steps.setdefault(objective, make_eval_step(bundle.config, objective))
        return score_rows(step, bundle.params, batches, contexts, corpus.token_bytes)

    parent = load_model(TINY_AR, dtype=best.config.dtype, param_dtype="float32")
    sizes = report.block_sizes
    jobs = [
        ("AR parent", parent, "ar", 1),
        ("AR continued", ar, "ar", 1),
        *(("best single", best, "bdlm", size) for size in sizes),
        *(("merged", merged, "bdlm", size) for size in sizes),
        ("parent before conversion", parent, "bdlm", TARGET_BLOCK_SIZE),
    ]
    scores: dict[str, dict[str, RowScores]] = {}
    for name, bundle, objective, size in progress.bar(jobs, "bits per byte"):
        column = "ar" if objective == "ar" else str(size)
        scores.setdefault(name, {})[column] = score(bundle, objective, size)
    results["bits_per_byte"] = {
        name: {column: rows.figures() for column, rows in row.items()}
        for name, row in scores.items()
    }
    for name, row in results["bits_per_byte"].items():
        print(f"{name:>26}: ", {k: round(v["bits_per_byte"], 3) for k, v in row.items()})
    results["merge"]["gain"] = {
        column: _difference(rows, scores["best single"][column])
        for column, rows in scores["merged"].items()
    }
    rows = jax.tree.map(lambda x: x[: report.exact_rows], batches[0])
    results["exact_check"] = _exact_check(merged, rows)
    print(f"bound at block size 1 against the left-to-right chain: {results['exact_check']}")


def _difference(a: RowScores, b: RowScores) -> dict[str, float]:
    bits, error = a.minus(b)
    return {"bits_per_byte": bits, "stderr": error}


def _exact_check(bundle: ModelBundle, batch: Batch) -> dict[str, float]:
    """The bound at block size 1 against the exact chain through the decoding path, in fp32.

    Only the first document of each row is compared: the chain takes one document a row.
    """
    first = batch.segment_ids == 1
    batch = dataclasses.replace(
        batch,
        segment_ids=np.where(first, batch.segment_ids, 0),
        loss_mask=batch.loss_mask & first,
    )
    cfg = dataclasses.replace(bundle.config, dtype="float32")
    context = validation_contexts(1, bundle.special.mask, 1)[0]
    bound = np.asarray(make_eval_step(cfg, "bdlm")(bundle.params, batch, context).nll)
    mask_id = bundle.special.mask
    chain = jax.jit(lambda p: left_to_right_nll(cfg, p, batch, mask_id))(bundle.params)
    return {
        "tokens": int(batch.loss_mask.sum()),
        "bound_nats": float(bound.sum()),
        "chain_nats": float(np.asarray(chain).sum()),
        "largest_difference": float(np.abs(bound - np.asarray(chain)).max()),
    }


def held_out_prompts(
    source: str, tokenizer: Tokenizer, count: int, prompt_tokens: int, new_tokens: int
) -> list[tuple[str, list[int]]]:
    """(file, prompt ids) of functions in validation files: the text up to and including a `def`
    line, at most prompt_tokens of it, spread evenly over the files that have enough text."""
    found = []
    for document in documents(source, "validation"):
        prompt = _prompt_of(document, tokenizer, prompt_tokens, new_tokens)
        if prompt is not None:
            found.append((document.name, prompt))
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
    return [found[i] for i in chosen]


def _prompt_of(document: Document, tokenizer: Tokenizer, prompt_tokens: int, new_tokens: int):
    middle = len(document.text) // 3
    start = document.text.find("def ", middle)
    end = document.text.find(":\n", start)
    if start < 0 or end < 0 or len(document.text) < end + 4 * new_tokens:
        return None
    ids = tokenizer.encode(document.text[: end + 1], add_special_tokens=False).ids
    return ids[-prompt_tokens:]


def _measure_generation(results, report: ReportConfig, cfg: TrainConfig, merged) -> None:
    """Completions at each threshold: tokens per forward, tokens per second, and the texts."""
    engine = Engine(merged)
    tokenizer = tokenizer_of(merged)
    prompts = held_out_prompts(
        cfg.data.source, tokenizer, report.prompts, report.prompt_tokens, report.max_new_tokens
    )
    ids = [p for _, p in prompts]

    def complete(threshold: float) -> list[Completion]:
        return engine.generate(
            ids, trajectory=True, threshold=threshold, max_new_tokens=report.max_new_tokens
        )

    complete(report.thresholds[0])  # compiles; the threshold is data
    turns = [t for _ in range(report.rounds) for t in report.thresholds]
    done: dict[float, list[Completion]] = {}
    speeds: dict[float, list[float]] = {t: [] for t in report.thresholds}
    for threshold in progress.bar(turns, "completions"):
        done[threshold] = complete(threshold)
        speeds[threshold].append(_tokens_per_second(done[threshold]))
    rows = [
        {"threshold": t, **_tokens_per_forward(done[t]), "tokens_per_second": speeds[t]}
        for t in report.thresholds
    ]
    for row in rows:
        print({k: np.round(v, 3).tolist() for k, v in row.items()})
    middle = report.thresholds[len(report.thresholds) // 2]
    results["trajectory"] = _trajectory(done[middle][0], tokenizer, middle)
    results["generation"] = rows
    results["samples"] = [
        {
            "file": name,
            "prompt": tokenizer.decode(prompt),
            "completions": {str(t): done[t][i].text for t in report.thresholds},
        }
        for i, (name, prompt) in enumerate(prompts)
    ]


def _tokens_per_forward(done: Sequence[Completion]) -> dict[str, float]:
    return {
        "tokens_per_forward": tokens_per_forward(*done),
        "tokens_per_forward_with_commits": tokens_per_forward(*done, commits=True),
    }


def _tokens_per_second(done: Sequence[Completion]) -> float:
    return sum(len(c.tokens) for c in done) / sum(c.seconds for c in done)


def _trajectory(done: Completion, tokenizer: Tokenizer, threshold: float) -> dict[str, Any]:
    assert done.trajectory is not None
    return {
        "threshold": threshold,
        "tokens": [tokenizer.decode([t], skip_special_tokens=False) for t in done.tokens],
        "accepted_at": done.trajectory.accepted_at.tolist(),
        "confidence": done.trajectory.confidence.tolist(),
    }


def _measure_speed(results, report: ReportConfig, cfg: TrainConfig, merged) -> None:
    """Cached against recomputed prefix, compile count, and the wait for input."""
    # fp32, so that both ways must give the same tokens, not only nearly the same logits.
    config = dataclasses.replace(merged.config, dtype="float32")
    engine = Engine(dataclasses.replace(merged, config=config))
    prompt = held_out_prompts(cfg.data.source, tokenizer_of(merged), 1, 32, 64)[0][1]
    options = {"max_new_tokens": report.speed_tokens, "stop_on_eos": False, "threshold": 0.9}
    before = compile_count()
    timed = {}
    for name, cache in (("cached", True), ("uncached", False)):
        engine.generate([prompt], cache=cache, **options)
        if cache:
            engine.generate([prompt], **{**options, "threshold": 0.7})  # data: compiles nothing
            compiles = compile_count() - before
        timed[name] = engine.generate([prompt], cache=cache, **options)[0]
    waits = [
        m["input_wait_fraction"]
        for m in read_metrics(Path(cfg.workdir), "train")
        if "input_wait_fraction" in m
    ]
    results["speed"] = {
        "new_tokens": report.speed_tokens,
        "cached_seconds": timed["cached"].seconds,
        "uncached_seconds": timed["uncached"].seconds,
        "uncached_over_cached": timed["uncached"].seconds / timed["cached"].seconds,
        "same_tokens": timed["cached"].tokens == timed["uncached"].tokens,
        "compiles_per_shape": compiles,
        "input_wait_fraction": float(np.mean(waits)),
    }
    print(results["speed"])


_HELP = f"""\
usage: llada2 quickstart [--config=FILE] [--config.FIELD=VALUE ...] [--workdir DIR]
                         [--print_config]

The whole conversion on this machine, on real text, nothing downloaded: the Python standard
library as corpus, a small autoregressive mixture of experts as parent, Warmup-Stable-Decay
conversion to block diffusion, top-k merge, generation, and a report with plots.

  --config=FILE     default configs/quickstart.py (about ten minutes on two CPU cores);
                    configs/quickstart_long.py trains the parent too and takes hours
  --config.a.b=c    overrides a field; an unknown field is an error
  --workdir=DIR     default runs/quickstart. Stopped, it goes on there: training from its last
                    checkpoint, the measurements from their beginning
  --print_config    prints every field with its value and stops

examples:
  llada2 quickstart
  llada2 quickstart --workdir=runs/more --config.conversion.schedule.stable_tokens=1000000
  llada2 quickstart --config=configs/quickstart_long.py

Writes report.md, report.json and plots into the workdir.

{EXIT_STATUS}"""


def _check_overrides(config: Any, argv: list[str]) -> None:
    """A parent that ships is not trained: nothing may pretend to change how."""
    if not config.train_parent and any(a.lstrip("-").startswith("config.parent.") for a in argv):
        raise UsageError(
            "config.parent is not read where config.train_parent=False: the parent that ships is "
            "used; add --config.train_parent to train another"
        )


def main(argv: list[str]) -> int:
    """`llada2 quickstart`."""
    if {"-h", "--help"} & set(argv):
        print(_HELP)
        return 0
    values = parse_flags("llada2 quickstart", argv, config="configs/quickstart.py")
    if values.print_config:
        print(values.config)
        return 0
    _check_overrides(values.config, argv)
    run(values.config)
    return 0
