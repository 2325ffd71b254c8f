"""`llada2 quickstart`: corpus, parent, conversion, merge, generation and a report, in one command.

It is the template of every larger run: each stage is one call that any user can make alone.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from tokenizers import Tokenizer

from llada2_jax import progress, quickstart_report
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import ConfigError, TrainConfig
from llada2_jax.config_check import from_dict, validate
from llada2_jax.config_flags import parse_flags
from llada2_jax.data.corpus import Corpus, load_corpus
from llada2_jax.data.documents import Document, documents
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.engine import Completion, Engine, tokens_per_second
from llada2_jax.errors import EXIT_STATUS, UsageError
from llada2_jax.evals.likelihood import left_to_right_nll, tokenizer_of, validation_contexts
from llada2_jax.evals.validation import RowScores, score_rows
from llada2_jax.folders import is_checkpoint
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.hub.streaming import Options, convert
from llada2_jax.merge import merge_checkpoints, select_best
from llada2_jax.metrics import read_metrics
from llada2_jax.plan import planned_model
from llada2_jax.sampler import compile_count, tokens_per_forward
from llada2_jax.sharding import make_mesh, shardings
from llada2_jax.train import saves_after, train
from llada2_jax.train_step import make_eval_step
from llada2_jax.types import Batch


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """eval_rows, eval_samples: validation rows and Monte Carlo draws of the final figures.
    exact_rows: how many of them for the check of the bound at block size 1. prompts, prompt_tokens,
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


SPEED_PROMPT = 32
"""Tokens of the speed test's prompt."""


def say(text: str) -> None:
    """A stage's headline."""
    print(f"\n== {text}", flush=True)


def run(config: Any) -> Path:
    """The pipeline; returns the report's path. Stages that a workdir holds already are resumed.

    config: a ConfigDict as configs/quickstart.py gives it; its fields have no static types.
    Raises: ConfigError as `read_config`, before anything is trained; what `train` raises.
    """
    started = time.perf_counter()
    work = Path(config.workdir)
    if config.train_parent:
        config = config.copy_and_resolve_references()
        config.ar.init.checkpoint = config.conversion.init.checkpoint = str(work / "tiny_ar")
    ar_cfg, conversion_cfg, report = read_config(config)
    results: dict[str, Any] = {"config": _plain(config)}
    if config.train_parent:
        _train_parent(config, work)
    say("corpus: the Python standard library's own source")
    corpus = _corpus(config)
    results["corpus"] = _describe_corpus(corpus)
    print(results["corpus"])
    rows = _validation_rows(corpus, conversion_cfg, report)

    say("the autoregressive parent, continued briefly")
    ar = train(ar_cfg, corpus=corpus)
    say("conversion: warmup, stable, decay")
    train(conversion_cfg, corpus=corpus)
    say("merge of the best checkpoints of the last phase")
    best, merged = _merge(work, config.merge_top_k, results)
    say("bits per byte")
    _measure_likelihood(results, report, corpus, rows, conversion_cfg, ar, best, merged)
    say("completions of held-out functions")
    _measure_generation(results, report, conversion_cfg, merged)
    say("speed")
    _measure_speed(results, report, conversion_cfg, merged)
    results["runs"] = {name: read_metrics(work / name) for name in ("parent", "ar", "conversion")}
    results["seconds"] = time.perf_counter() - started
    path = quickstart_report.write(work, results)
    say(f"done in {results['seconds'] / 60:.1f} minutes: {path}")
    return path


def read_config(config: Any) -> tuple[TrainConfig, TrainConfig, ReportConfig]:
    """What the autoregressive continuation and the conversion train, and what is measured then.

    Raises: ConfigError for whatever would otherwise come to light when the models are trained.
    """
    work = Path(config.workdir)
    ar, conversion = (_placed(config[name], work / name) for name in ("ar", "conversion"))
    for name, data in (("ar", ar.data), ("conversion", conversion.data)):
        if data.sources or data.source != conversion.data.source:
            raise ConfigError(
                f"config.{name}.data: both stages read the one corpus that "
                "config.conversion.data.source names, and no sources"
            )
    model = planned_model(validate(config.parent) if config.train_parent else conversion)
    report = from_dict(ReportConfig, config.report.to_dict(), "config.report")
    _check_report(report, conversion, model.max_position_embeddings)
    _check_merge(conversion, config.merge_top_k)
    held_out_functions(conversion.data.source, 1, report.max_new_tokens)
    return ar, conversion, report


def _check_report(report: ReportConfig, conversion: TrainConfig, positions: int) -> None:
    """positions: tokens of the longest text that the model takes."""
    rows = _rows_together(conversion)
    row, sizes, thresholds = conversion.data.row_length, report.block_sizes, report.thresholds
    numbers = {name: n for name, n in dataclasses.asdict(report).items() if isinstance(n, int)}
    for name, good, rule in (
        *((name, number >= 1, "at least 1") for name, number in numbers.items()),
        ("eval_rows", report.eval_rows % rows == 0, f"a multiple of {rows}, a forward's rows"),
        ("exact_rows", report.exact_rows <= report.eval_rows, "at most config.report.eval_rows"),
        (
            "block_sizes",
            bool(sizes) and all(size >= 1 and row % size == 0 for size in sizes),
            f"divisors of config.conversion.data.row_length={row}, one at least",
        ),
        (
            "thresholds",
            bool(thresholds) and all(0 <= threshold <= 1 for threshold in thresholds),
            "from 0 to 1, one at least",
        ),
        (
            "max_new_tokens",
            report.prompt_tokens + report.max_new_tokens <= positions,
            f"with prompt_tokens={report.prompt_tokens} within the model's {positions} positions",
        ),
        (
            "speed_tokens",
            SPEED_PROMPT + report.speed_tokens <= positions,
            f"with a prompt of {SPEED_PROMPT} within the model's {positions} positions",
        ),
    ):
        if not good:
            raise ConfigError(f"config.report.{name}={getattr(report, name)!r} must be {rule}")


def _check_merge(conversion: TrainConfig, top_k: int) -> None:
    """Whether the conversion's last phase leaves as many checkpoints as are to be merged."""
    begin, end = (0, *conversion.phase_ends)[-2:]
    saved = sum(saves_after(conversion, step) for step in range(begin + 1, end + 1))
    kept = conversion.checkpoint.keep_best
    if not 1 <= top_k <= min(saved, kept):
        raise ConfigError(
            f"config.merge_top_k={top_k}: the conversion's last phase saves {saved} checkpoints "
            f"and keeps the {kept} best, so choose from 1 to {min(saved, kept)}, or change "
            "config.conversion.checkpoint.every_tokens and keep_best"
        )


def _rows_together(cfg: TrainConfig) -> int:
    """Rows that are scored together: as many as in training, whose programs serve again."""
    return cfg.data.rows_per_step // cfg.optimizer.accumulate


def _validation_rows(corpus: Corpus, cfg: TrainConfig, report: ReportConfig) -> list[Batch]:
    try:
        return corpus.validation_batches(cfg.data, report.eval_rows, _rows_together(cfg))
    except ValueError as error:
        raise ConfigError(f"config.report.eval_rows: {error}") from error


def _plain(config: ml_collections.ConfigDict) -> dict:
    """The config without what the run does not use."""
    unused = () if config.train_parent else ("parent",)
    return {k: v for k, v in config.to_dict().items() if k not in unused}


def _placed(config: ml_collections.ConfigDict, workdir: Path) -> TrainConfig:
    config = config.copy_and_resolve_references()
    config.workdir = str(workdir)
    return validate(config)


def _train_parent(config, work: Path) -> None:
    """Stage 1 of the long run: tokenizer, parent, and a checkpoint such as the one that ships."""
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
    out = Path(config.conversion.init.checkpoint)
    convert(last, out, Options(to="hf", dtype="bfloat16", overwrite=True))


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
    results,
    report: ReportConfig,
    corpus: Corpus,
    batches: list[Batch],
    conversion: TrainConfig,
    ar: ModelBundle,
    best: ModelBundle,
    merged: ModelBundle,
) -> None:
    """Bits per byte on the same validation bytes: AR, and the diffusion models by block size."""
    target = conversion.phases[-1].block_size  # that it decodes with
    mesh = make_mesh(conversion.mesh)

    def score(bundle: ModelBundle, objective: str, block_size: int) -> RowScores:
        contexts = validation_contexts(
            block_size, bundle.special.mask, 1 if objective == "ar" else report.eval_samples
        )
        step = make_eval_step(bundle.config, objective, mesh)
        params = jax.device_put(bundle.params, shardings(bundle.params, mesh))
        return score_rows(step, params, batches, contexts, corpus.token_bytes)

    parent = load_model(conversion.init.checkpoint, dtype=best.config.dtype, param_dtype="float32")
    sizes = report.block_sizes
    jobs = [
        ("AR parent", parent, "ar", 1),
        ("AR continued", ar, "ar", 1),
        *(("best single", best, "bdlm", size) for size in sizes),
        *(("merged", merged, "bdlm", size) for size in sizes),
        ("parent before conversion", parent, "bdlm", target),
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
    rows = jax.tree.map(lambda *parts: np.concatenate(parts)[: report.exact_rows], *batches)
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
    line, at most prompt_tokens of it. Files and errors as in `held_out_functions`."""
    found = held_out_functions(source, count, new_tokens)
    encoded = [tokenizer.encode(text, add_special_tokens=False).ids for _, text in found]
    return [(name, ids[-prompt_tokens:]) for (name, _), ids in zip(found, encoded, strict=True)]


def held_out_functions(source: str, count: int, new_tokens: int) -> list[tuple[str, str]]:
    """(file, text up to and including a `def` line) of validation files, spread evenly over those
    that have enough text after it. Raises: ConfigError where no file has."""
    try:
        held_out = [(d.name, _function_of(d, new_tokens)) for d in documents(source, "validation")]
    except ValueError as error:
        raise ConfigError(f"config.conversion: {error}") from error
    found = [(name, text) for name, text in held_out if text]
    if not found:
        raise ConfigError(
            f"config.conversion.data.source={source!r}: none of its {len(held_out)} validation "
            "files has a function to complete, with enough text after it: choose another source, "
            f"or lower config.report.max_new_tokens={new_tokens}"
        )
    chosen = np.linspace(0, len(found) - 1, min(count, len(found))).astype(int)
    return [found[i] for i in chosen]


def _function_of(document: Document, new_tokens: int) -> str:
    """The text up to the first function beyond a third of it; empty where there is none."""
    text = document.text
    start = text.find("def ", len(text) // 3)
    end = text.find(":\n", start)
    enough = start >= 0 and end >= 0 and len(text) >= end + 4 * new_tokens
    return text[: end + 1] if enough else ""


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
        speeds[threshold].append(tokens_per_second(done[threshold]))
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
    [(_, prompt)] = held_out_prompts(
        cfg.data.source, tokenizer_of(merged), 1, SPEED_PROMPT, report.max_new_tokens
    )
    options = {"max_new_tokens": report.speed_tokens, "stop_on_eos": False, "threshold": 0.9}
    before = compile_count()
    timed = {}
    for name, cache in progress.bar([("cached", True), ("uncached", False)], "speed", unit="way"):
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
