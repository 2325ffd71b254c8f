"""`llada2 posttrain`: tasks to SFT, CAP and DPO to a report, as small as it goes; and once more."""

import json
from pathlib import Path

import pytest

from llada2_jax import posttrain, train
from llada2_jax.checkpoint import ModelBundle, save_model
from llada2_jax.config import load_config
from llada2_jax.data.tokenizer import tokenizer_files, train_tokenizer
from llada2_jax.evals.tasks import make_tasks
from llada2_jax.metrics import read_metrics
from tests.data_helpers import SPECIAL
from tests.helpers import one_layer, random_params

CONFIG = Path(__file__).parents[2] / "configs" / "posttrain.py"
VOCAB, ROW, ROWS, BLOCK = 512, 256, 2, 8
ARMS = ("sft", "cap", "cap_dpo")
FAMILIES = {"word_sequence_reversal": {"min_words": 2, "max_words": 3}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random model, and a tokenizer that knows the tasks' words."""
    path = tmp_path_factory.mktemp("base") / "model"
    [tasks] = make_tasks(FAMILIES, (200,), 0)
    files = tokenizer_files(train_tokenizer([task.question for task in tasks], VOCAB))
    cfg = one_layer(vocab_size=VOCAB, max_position_embeddings=ROW)
    save_model(path, ModelBundle(cfg, random_params(cfg, 0, 0.3), SPECIAL, tokenizer_files=files))
    return path


def small(base: Path, workdir: Path):
    """Some of the shipped config's arms, with three steps each."""
    config = load_config(CONFIG)
    with config.unlocked():
        config.workdir, config.base = str(workdir), str(base)
        config.families = FAMILIES
        config.arms = {arm: config.arms[arm].to_dict() for arm in ARMS}
        config.comparisons = {"stages": ARMS}
    config.tasks.update({"train": 60, "preference": 30, "test": 3})
    config.preferences.samples = 1
    config.decoding.update(
        {"thresholds": (0.9, 0.6), "block_sizes": (BLOCK,), "max_new_tokens": 16, "batch": 30}
    )
    for name, stage in config.stages.items():
        stage.data.row_length, stage.data.rows_per_step = ROW, ROWS
        stage.data.pad_multiple = stage.schedule.posttrain_block = BLOCK
        stage.schedule[f"{name}_tokens"] = 3 * ROWS * ROW
        stage.eval.rows, stage.log_every = ROWS, 1
        stage.runtime.dtype = "float32"
    return config


def test_stages_are_trained_decoded_and_compared(base, tmp_path, capsys, monkeypatch):
    path = posttrain.run(small(base, tmp_path))
    report = path.read_text()
    results = json.loads((tmp_path / "report.json").read_text())
    assert sorted(results["points"]) == sorted(ARMS)
    for arm in ARMS:
        assert arm in report
        folder = tmp_path / "seed0" / "arms" / arm
        assert [m["step"] for m in read_metrics(folder, "train")] == [1, 2, 3]
        evaluation = json.loads((folder / "evaluation.json").read_text())
        outcomes = evaluation["outcomes"]
        assert 0 < evaluation["seconds"] < results["seconds"]
        assert [(o["threshold"], o["block_size"]) for o in outcomes] == [(0.9, 8), (0.6, 8)]
        assert all(len(o["correct"]["word_sequence_reversal"]) == 3 for o in outcomes)
    # A random model answers wrongly, and each wrong answer is a pair.
    pairs = (tmp_path / "seed0" / "preferences" / "rows.jsonl").read_text().splitlines()
    assert len(pairs) > 20 and all(
        json.loads(pair)["chosen"] != json.loads(pair)["rejected"] for pair in pairs
    )
    for plot in ("stages-thresholds.png", "stages-blocks.png"):
        assert plot in report and (tmp_path / plot).read_bytes().startswith(b"\x89PNG")

    # Again: what is done is neither trained nor decoded a second time.
    def unwanted(*_, **__):
        raise AssertionError("done before")

    monkeypatch.setattr(posttrain, "evaluate", unwanted)
    monkeypatch.setattr(train, "place_batch", unwanted)
    (tmp_path / "report.md").unlink()
    assert posttrain.run(small(base, tmp_path)).read_text()
    assert "resuming" in capsys.readouterr().out
    again = json.loads((tmp_path / "report.json").read_text())
    assert again["seconds_of_all_calls"] == results["seconds_of_all_calls"] > 0
