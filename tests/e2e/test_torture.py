"""A run that is killed, preempted, starved and given damaged checkpoints ends as if undisturbed.

`make torture` does the same for a thousand faults.
"""

import copy
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torture.__main__ import Lineage, Tortured, summary, torture

FAULTS, SEED = 6, 1
STEPS = 36  # the first of the two bad ones is among them


def test_some_faults_leave_no_trace(tmp_path):
    options = [f"--faults={FAULTS}", f"--steps={STEPS}", f"--seed={SEED}", f"--out={tmp_path}"]
    command = [sys.executable, "-m", "tests.torture", *options]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    faults = [kind for result in results for kind in result["faults"]]
    assert sum(sum(result["faults"].values()) for result in results) >= FAULTS
    assert len(set(faults)) >= 3
    # Asked for no more than it has survived, it starts nothing.
    torture(tmp_path, FAULTS, SEED, STEPS)
    assert f"in {len(results)} runs" in summary(tmp_path)


@pytest.mark.parametrize("change", ["loss", "a step less", "documents"])
def test_a_trace_would_be_found(tmp_path, monkeypatch, change):
    good = Lineage(tmp_path, tmp_path / "good", random.Random(0))
    (tmp_path / "good").mkdir()
    lines = [{"step": s, "kind": "train", "loss": 0.1 * s, "seconds": s} for s in (1, 2)]
    good.seen = {1: [(7, 0, 30), (9, 0, 34)], 2: [(9, 0, 64)]}
    other = copy.deepcopy(good)
    other.workdir = tmp_path / "other"
    other.workdir.mkdir()
    (tmp_path / "other.log").touch()
    monkeypatch.setattr(Lineage, "state", lambda self: {})
    write(good.workdir, lines)
    write(other.workdir, [{**line, "seconds": 5 * line["seconds"]} for line in lines])
    other.check_against(good)  # clocks may differ
    if change == "loss":
        write(other.workdir, [lines[0], {**lines[1], "loss": 0.2 + 1e-16 * 3}])
    elif change == "a step less":
        write(other.workdir, lines[:1])
    else:
        other.seen[2] = [(7, 0, 64)]
    with pytest.raises(Tortured, match="history" if change != "documents" else "tokens_seen"):
        other.check_against(good)


def write(workdir: Path, lines: list[dict]) -> None:
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
