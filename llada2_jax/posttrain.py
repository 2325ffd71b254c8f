"""`llada2 posttrain`: SFT, CAP and DPO on checkable tasks, and a report that compares them.

Arms are training runs that start from each other; each is trained and decoded once for each seed,
and a run that was stopped goes on at the arm where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llada2_jax import posttrain_report
from llada2_jax.checkpoint import ModelBundle
from llada2_jax.config import ConfigError, TrainConfig
from llada2_jax.config_check import validate
from llada2_jax.config_flags import parse_flags
from llada2_jax.data.chat import LLADA2_TEMPLATE, ChatTemplate
from llada2_jax.data.encoders import EncodeOptions
from llada2_jax.data.prepare import Job, prepare
from llada2_jax.data.sources import SourceSpec
from llada2_jax.engine import Completion, Engine, tokens_per_second
from llada2_jax.errors import EXIT_STATUS
from llada2_jax.evals.tasks import Task, gym_version, make_tasks, scores
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.metrics import read_metrics
from llada2_jax.progress import bar
from llada2_jax.sampler import tokens_per_forward
from llada2_jax.train import train

BASE = "base"
TEMPLATE = ChatTemplate(LLADA2_TEMPLATE)
VALIDATION_PERCENT = 10.0  # of rows that are trained on: losses and rewards come from these


@dataclasses.dataclass(frozen=True)
class Arm:
    """name; stage: which of config.stages; start: the arm it starts from, or BASE; changes: to the
    stage's config."""

    name: str
    stage: str
    start: str
    changes: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How test tasks are decoded."""

    threshold: float
    block_size: int


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of one arm, seed and setting. correct: {family: right answers, one bool a task};
    tokens_per_forward: accepted tokens per denoising forward; tokens_per_second: decoded tokens
    over total time, without compilation."""

    threshold: float
    block_size: int
    correct: dict[str, list[bool]]
    tokens_per_forward: float
    tokens_per_second: float


def run(config: Any) -> Path:
    """The whole study; returns the report's path.

    config: a ConfigDict as configs/posttrain.py gives it; its fields have no static types.
    Raises: ConfigError for arms that do not fit together, before anything runs.
    """
    started = time.perf_counter()
    work = Path(config.workdir)
    arms = read_arms(config)
    base = load_bundle(config.base)
    print("tasks: reasoning-gym", gym_version(), flush=True)
    splits = ("train", "preference", "test")
    counts = [config.tasks[split] for split in splits]
    tasks = dict(
        zip(splits, make_tasks(config.families.to_dict(), counts, config.tasks.seed), strict=True)
    )
    prepared = _prepare_chats(work / "data" / "chats", tasks["train"], base)
    results: dict[str, Any] = {"config": config.to_dict(), "gym": gym_version(), "arms": {}}
    for seed in config.seeds:
        folder = work / f"seed{seed}"
        models: dict[str, Path] = {BASE: Path(config.base)}
        for arm in arms:
            begun, data = time.perf_counter(), prepared
            if arm.stage == "dpo":
                data = _preferences(config, folder, models["sft"], tasks["preference"], base)
            cfg = arm_config(config, arm, seed, models[arm.start], data)
            print(f"\n== {arm.name}, seed {seed}", flush=True)
            train(cfg)
            models[arm.name] = last_checkpoint(cfg)
            found = _decoded(config, arm, cfg, models[arm.name], tasks["test"], begun)
            results["arms"].setdefault(arm.name, []).append(
                {"seed": seed, **found, "metrics": read_metrics(Path(cfg.workdir))}
            )
    results["seconds"] = time.perf_counter() - started
    path = posttrain_report.write(work, results)
    print(f"\ndone in {results['seconds'] / 60:.1f} minutes: {path}")
    return path


def read_arms(config: Any) -> list[Arm]:
    """The arms, each after the one it starts from.

    Raises: ConfigError for an unknown stage or start, a circle, or a comparison of unknown arms.
    """
    arms = {name: Arm(name, **fields) for name, fields in config.arms.to_dict().items()}
    for arm in arms.values():
        where = f"config.arms.{arm.name}"
        if arm.stage not in config.stages:
            raise ConfigError(f"{where}.stage={arm.stage!r}: choose one of {[*config.stages]}")
        if arm.start not in (BASE, *arms):
            raise ConfigError(f"{where}.start={arm.start!r}: choose one of {[BASE, *arms]}")
        if arm.stage == "dpo" and "sft" not in arms:
            raise ConfigError(f"{where}: preference pairs come from the answers of an arm 'sft'")
    for name, members in config.comparisons.items():
        unknown = sorted(set(members) - set(arms))
        if unknown:
            raise ConfigError(f"config.comparisons.{name}: there is no arm {', '.join(unknown)}")
    ordered: dict[str, Arm] = {}
    while len(ordered) < len(arms):
        ready = [a for a in arms.values() if a.name not in ordered and a.start in (BASE, *ordered)]
        if not ready:
            circle = sorted(set(arms) - set(ordered))
            raise ConfigError(f"config.arms: {', '.join(circle)} start from each other")
        ordered |= {arm.name: arm for arm in ready}
    # Pairs are made with the arm "sft", so it comes before every DPO.
    return sorted(ordered.values(), key=lambda arm: arm.name != "sft" and arm.stage == "dpo")


def arm_config(config: Any, arm: Arm, seed: int, start: Path, data: Path) -> TrainConfig:
    """The training config of one arm. Raises: ConfigError, from `validate` or for unknown
    changes."""
    stage = config.stages[arm.stage].copy_and_resolve_references()
    try:
        stage.update(dict(arm.changes))
    except (AttributeError, KeyError, TypeError) as error:
        raise ConfigError(f"config.arms.{arm.name}.changes: {error}") from error
    stage.workdir = str(Path(config.workdir) / f"seed{seed}" / "arms" / arm.name)
    stage.seed = seed
    stage.init.checkpoint = str(start)
    stage.data.sources = (str(data),)
    return validate(stage)


def last_checkpoint(cfg: TrainConfig) -> Path:
    return Path(cfg.workdir) / "checkpoints" / str(cfg.total_steps)


# ------------------------------------------------------------------------------------------- data


def _user(task: Task) -> list[dict[str, str]]:
    return [{"role": "user", "content": task.question}]


def _prepare_chats(folder: Path, tasks: Sequence[Task], base: ModelBundle) -> Path:
    chats = ({"messages": [*_user(t), _assistant(t.answer)]} for t in tasks)
    return _prepared(folder, chats, "chat", base)


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _preferences(
    config: Any, folder: Path, model: Path, tasks: Sequence[Task], base: ModelBundle
) -> Path:
    """Pairs of the right answer and a wrong one that the SFT model gave itself, prepared."""
    out = folder / "preferences"
    if (out / "prepared" / "manifest.json").exists():
        return out / "prepared"
    print("\n== preference pairs: the SFT model's own wrong answers", flush=True)
    engine = Engine(load_model(model), max_batch=config.decoding.batch)
    prompts = [prompt_text(task) for task in tasks]
    options = dict(config.preferences)
    pairs: dict[tuple[str, str], dict[str, str]] = {}
    for sample in range(options.pop("samples")):
        answers = _answers(
            engine,
            prompts,
            f"sample {sample + 1}",
            seed=sample,
            max_new_tokens=config.decoding.max_new_tokens,
            **options,
        )
        texts = [(answer.text or "").strip() for answer in answers]
        for task, text, right in zip(tasks, texts, scores(tasks, texts), strict=True):
            if text and not right:
                pair = {"prompt": task.question, "chosen": task.answer, "rejected": text}
                pairs[task.question, text] = pair
    if not pairs:
        raise ConfigError(
            f"the model in {model} gave no wrong answer to {len(tasks)} tasks, so there are no "
            "preference pairs: raise config.preferences.temperature or samples"
        )
    return _prepared(out, pairs.values(), "preference", base)


def _prepared(folder: Path, rows, content: str, base: ModelBundle) -> Path:
    """Rows as a JSONL file and tokenized; a folder that is complete is left as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "rows.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:  # preparation goes by its time of change
        path.write_text(text)
    job = Job(
        SourceSpec(str(path), "jsonl"),
        EncodeOptions(content=content, template=LLADA2_TEMPLATE),
        base.tokenizer_files,
        base.special,
        max_bad_fraction=0.0,
        validation_percent=VALIDATION_PERCENT,
    )
    prepare(job, folder / "prepared")
    return folder / "prepared"


# --------------------------------------------------------------------------------------- decoding


def prompt_text(task: Task) -> str:
    """What the model continues."""
    return TEMPLATE.render(_user(task), add_generation_prompt=True)


def settings(decoding: Any, trained_block: int) -> list[Setting]:
    """All pairs of threshold and block size; or each threshold at the block size of training, and
    each block size at 0.9."""
    thresholds, sizes = decoding.thresholds, decoding.block_sizes
    if decoding.every_pair:
        chosen = [Setting(t, size) for size in sizes for t in thresholds]
    else:
        chosen = [Setting(t, trained_block) for t in thresholds]
        chosen += [Setting(0.9, size) for size in sizes]
    return list(dict.fromkeys(chosen))


def _decoded(
    config: Any, arm: Arm, cfg: TrainConfig, model: Path, tasks: Sequence[Task], begun: float
) -> dict[str, Any]:
    """outcomes: at every setting, from the arm's evaluation.json as far as that holds them.
    seconds: what calls that trained or decoded spent on the arm, if they came to an outcome; None
    where an older version left no note of it. begun: when this call began with the arm."""
    path = Path(cfg.workdir) / "evaluation.json"
    asked = {"families": config.families.to_dict(), "tasks": config.tasks.to_dict()}
    kept = json.loads(path.read_text()) if path.exists() else {}
    kept = kept if kept.get("asked") == asked else {}
    done = kept.get("outcomes", [])
    seconds = before = kept.get("seconds") if kept else 0.0
    have = {Setting(o["threshold"], o["block_size"]) for o in done}
    wanted = settings(config.decoding, cfg.schedule.posttrain_block)
    missing = [s for s in wanted if s not in have]
    if missing:
        engine = Engine(load_model(model), max_batch=config.decoding.batch)
        for setting in missing:
            outcome = evaluate(engine, tasks, setting, config.decoding.max_new_tokens)
            done.append(dataclasses.asdict(outcome))
            if before is not None:
                seconds = before + time.perf_counter() - begun
            path.write_text(json.dumps({"asked": asked, "outcomes": done, "seconds": seconds}))
            right = np.mean([np.mean(v) for v in outcome.correct.values()])
            print(
                f"{arm.name}: threshold {setting.threshold}, block {setting.block_size}: "
                f"score {right:.3f}, {outcome.tokens_per_forward:.2f} tokens/forward"
            )
    outcomes = [o for o in done if Setting(o["threshold"], o["block_size"]) in wanted]
    return {"outcomes": outcomes, "seconds": seconds}


def evaluate(
    engine: Engine, tasks: Sequence[Task], setting: Setting, max_new_tokens: int
) -> Outcome:
    """Answers the tasks greedily and scores the answers."""
    done = _answers(
        engine,
        [prompt_text(task) for task in tasks],
        f"{setting.threshold} / {setting.block_size}",
        threshold=setting.threshold,
        block_size=setting.block_size,
        max_new_tokens=max_new_tokens,
    )
    correct: dict[str, list[bool]] = {}
    for task, right in zip(tasks, scores(tasks, [c.text or "" for c in done]), strict=True):
        correct.setdefault(task.family, []).append(right)
    return Outcome(
        setting.threshold,
        setting.block_size,
        correct,
        tokens_per_forward=tokens_per_forward(*done),
        tokens_per_second=tokens_per_second(done),
    )


def _answers(engine: Engine, prompts: list[str], what: str, **options: Any) -> list[Completion]:
    with bar(total=len(prompts), what=what, unit="task") as shown:
        return engine.generate(prompts, progress=shown.update, **options)


_HELP = f"""\
usage: llada2 posttrain [--config=FILE] [--config.FIELD=VALUE ...] [--workdir DIR] [--print_config]

Post-training of a converted model on tasks that can be checked (reasoning-gym): supervised
fine-tuning, confidence-aware parallel training, preference optimisation; then a report that
compares score, tokens per forward and tokens/s over thresholds and block sizes.

  --config=FILE     default configs/posttrain.py (about 15 minutes on two CPU cores);
                    configs/posttrain_study.py is the full grid with three seeds: hours
  --config.a.b=c    overrides a field; an unknown field is an error
  --workdir=DIR     default runs/posttrain. Stopped, it goes on there
  --print_config    prints every field with its value and stops

examples:
  llada2 quickstart && llada2 posttrain
  llada2 posttrain --config.base=runs/my_conversion/merged --config.seeds='(0, 1)'

Writes report.md, report.json and plots into the workdir.

{EXIT_STATUS}"""


def main(argv: list[str]) -> int:
    """`llada2 posttrain`."""
    if {"-h", "--help"} & set(argv):
        print(_HELP)
        return 0
    values = parse_flags("llada2 posttrain", argv, config="configs/posttrain.py")
    if values.print_config:
        print(values.config)
        return 0
    run(values.config)
    return 0
