"""`llada2 verify` passes on the released model's numbers, and on nothing that differs from them."""

import contextlib
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from llada2_jax import cli
from llada2_jax.checkpoint import CheckpointError
from llada2_jax.hub.streaming import Options, convert
from llada2_jax.verify import TOLERANCE, Result, case_names, read_goldens, verify

CASES = [
    *("full", "causal", "bd1", "bd4", "bd8", "bd32"),
    *(f"gen{i}" for i in range(8)),
    *("eos1", "eos3", "eos4", "eos6"),
]


@pytest.mark.parametrize(
    "name", ["llada2_tiny", pytest.param("llada2_tiny_yarn", marks=pytest.mark.slow)]
)
def test_golden_folders_pass(shared_goldens, name, capsys):
    assert cli.main(["verify", str(shared_goldens / name)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "case" and "denoising forwards equal" in lines[0]
    assert [line.split()[0] for line in lines[1:-1]] == CASES
    assert lines[-1].startswith("all 18 cases passed")


def test_yarn_passes(tmp_path, shared_goldens):
    """All logits, and the generations that are longer than the positions that YaRN stretches."""
    source = shared_goldens / "llada2_tiny_yarn"
    cases = (*CASES[:6], "gen3", "gen4", "eos3", "eos4")
    results = verify(source, goldens_with(tmp_path, source, lambda g: None, cases))
    assert [result.case for result in results] == [*cases]
    assert all(result.passed for result in results), results


def test_a_converted_checkpoint_passes(tmp_path, shared_goldens):
    source = shared_goldens / "llada2_tiny"
    convert(source, tmp_path / "ours", Options(mask_id=383))
    subset = goldens_with(tmp_path, source, lambda g: None, cases=("full", "bd4", "gen2"))
    results = verify(tmp_path / "ours", subset)
    assert len(results) == 3 and all(result.passed for result in results)


# ---- whatever differs is noticed -----------------------------------------------------------------


def goldens_with(tmp_path: Path, source: Path, change, cases=("full", "bd8", "gen2")) -> Path:
    """Some cases of a golden file, changed in place by `change`."""
    numbers = read_goldens(source / "goldens.npz")
    keep = {n: v for n, v in numbers.items() if "/" not in n or n.split("/")[0] in cases}
    change(keep)
    np.savez(tmp_path / "goldens.npz", **keep)  # pyright: ignore[reportArgumentType]
    return tmp_path / "goldens.npz"


def failing(checkpoint: Path, goldens: Path) -> dict[str, str]:
    """The cases that fail, and what differs, by the command, whose exit status is 1."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert cli.main(["verify", str(checkpoint), "--goldens", str(goldens)]) == 1
    *rows, last = out.getvalue().splitlines()
    problems = {row.split()[0]: row.split("FAILED: ")[1] for row in rows if "FAILED: " in row}
    assert last.endswith(f"cases FAILED: {', '.join(problems)}")
    return problems


@pytest.fixture
def tiny(shared_goldens) -> Path:
    return shared_goldens / "llada2_tiny"


def add(name, index, value):
    """A change: adds `value` to one number of one golden array."""

    def change(goldens):
        goldens[name] = goldens[name].copy()
        goldens[name][index] += value

    return change


@pytest.mark.parametrize(
    "weight",
    [
        "model.word_embeddings.weight",
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.0.mlp.up_proj.weight",
        "model.layers.1.attention.query_key_value.weight",
        "model.layers.1.attention.key_layernorm.weight",
        "model.layers.2.mlp.gate.weight",
        "model.layers.2.mlp.gate.expert_bias",
        "model.layers.3.mlp.experts.7.down_proj.weight",
        "model.layers.3.mlp.shared_experts.gate_proj.weight",
    ],
)
def test_one_weight(tmp_path, tiny, weight):
    folder = tmp_path / "changed"
    folder.mkdir()
    shutil.copy(tiny / "config.json", folder)
    tensors = safetensors.numpy.load_file(tiny / "model.safetensors")
    value = tensors[weight] = tensors[weight].copy()
    row = 383 if "embeddings" in weight else 0  # the mask's row is one that every case reads
    value.reshape(len(value), -1)[row, 0] += 0.5
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    goldens = goldens_with(tmp_path, tiny, lambda g: None, cases=("full", "bd8"))
    assert failing(folder, goldens)


def test_one_logit(tmp_path, tiny):
    goldens = goldens_with(tmp_path, tiny, add("bd8/logits", (150, 7), 3 * TOLERANCE))
    assert [*failing(tiny, goldens)] == ["bd8"]


def test_a_logit_that_is_not_a_number(tmp_path, tiny):
    goldens = goldens_with(tmp_path, tiny, add("full/logits", (1, 95, 3), np.nan))
    ((case, problem),) = failing(tiny, goldens).items()
    assert case == "full" and "row 1, position 95, token 3" in problem


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("full/input_ids", (0, 40)),
        ("bd8/noisy_ids", 3),
        ("bd8/clean_ids", 3),
        ("bd8/segment_ids", 0),
        ("gen2/prompt_ids", 0),
        ("gen2/output_ids", 5),
    ],
)
def test_one_id(tmp_path, tiny, name, index):
    step = -1 if name.endswith("_ids") and "segment" not in name else 9
    goldens = goldens_with(tmp_path, tiny, add(name, index, step))
    assert [*failing(tiny, goldens)] == [name.split("/")[0]]


@pytest.mark.parametrize("change", [add("gen2/forward_calls", (), 1), add("gen2/params", 3, 0.5)])
def test_one_count_or_parameter_of_a_generation(tmp_path, tiny, change):
    assert [*failing(tiny, goldens_with(tmp_path, tiny, change))] == ["gen2"]


def test_another_mask(tmp_path, tiny):
    goldens = goldens_with(tmp_path, tiny, add("mask_token_id", (), -1))
    assert [*failing(tiny, goldens)] == ["gen2"]


# ---- what cannot be verified ---------------------------------------------------------------------


def unusable(checkpoint: Path, goldens: Path, capsys) -> str:
    assert cli.main(["verify", str(checkpoint), "--goldens", str(goldens)]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llada2 verify: error: ") and error.count("\n") == 1
    return error


def test_another_eos(tmp_path, tiny, capsys):
    goldens = goldens_with(tmp_path, tiny, add("eos_token_id", (), -1))
    assert "eos_token_id is 379, the checkpoint's is 380" in unusable(tiny, goldens, capsys)


@pytest.mark.parametrize("name", ["mask_token_id", "full/logits", "bd8/segment_ids", "gen2/params"])
def test_a_number_is_missing(tmp_path, tiny, capsys, name):
    goldens = goldens_with(tmp_path, tiny, lambda g: g.pop(name))
    assert f"the goldens lack {name}" in unusable(tiny, goldens, capsys)


def test_an_id_beyond_the_vocabulary(tmp_path, tiny, capsys):
    goldens = goldens_with(tmp_path, tiny, add("full/input_ids", (0, 0), 384))
    assert "outside the vocabulary of 384" in unusable(tiny, goldens, capsys)


def test_an_unknown_case(tmp_path, tiny, capsys):
    goldens = goldens_with(tmp_path, tiny, lambda g: g.update({"odd/logits": np.ones(1)}))
    assert "a case 'odd'" in unusable(tiny, goldens, capsys)


def test_a_file_without_cases(tmp_path, tiny, capsys):
    goldens = goldens_with(tmp_path, tiny, lambda g: None, cases=())
    assert "has no case" in unusable(tiny, goldens, capsys)


def test_files_that_are_none(tmp_path, tiny, capsys):
    assert "name the goldens by --goldens" in unusable(tiny, tmp_path / "absent.npz", capsys)
    (tmp_path / "text.npz").write_text("no numbers")
    assert "no usable .npz file" in unusable(tiny, tmp_path / "text.npz", capsys)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert "model_type is 'llama'" in unusable(tmp_path, tiny / "goldens.npz", capsys)


@pytest.mark.parametrize("case", ["bd4b", "4", "bd", "gen", "fullx", "bd0", "bd" + "9" * 30])
def test_a_case_with_a_bad_name(tmp_path, tiny, capsys, case):
    goldens = goldens_with(tmp_path, tiny, lambda g: g.update({f"{case}/logits": np.ones(1)}))
    assert f"a case {case!r}, which this program cannot run" in unusable(tiny, goldens, capsys)


def test_a_npy_file(tmp_path, tiny, capsys):
    np.save(tmp_path / "goldens.npy", np.ones(3))
    error = unusable(tiny, tmp_path / "goldens.npy", capsys)
    assert "goldens.npy is no usable .npz file: it holds one array" in error


def test_a_damaged_file(tmp_path):
    """Cut anywhere, or with any byte changed, it is read or refused, and never a traceback."""
    path = tmp_path / "goldens.npz"
    np.savez_compressed(path, **{"full/logits": np.arange(64.0), "mask_token_id": np.int32(3)})
    whole, refused = path.read_bytes(), 0
    damaged = [whole[:n] for n in range(0, len(whole), 7)]
    damaged += [whole[:i] + bytes([whole[i] ^ 0xFF]) + whole[i + 1 :] for i in range(len(whole))]
    for data in damaged:
        path.write_bytes(data)
        try:
            read_goldens(path)
        except CheckpointError as error:
            assert str(path) in str(error)
            refused += 1
    assert refused > len(damaged) / 2


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("gen2/params", np.ones(2), "case gen2 cannot be run: not enough values"),
        ("gen2/params", np.array(["a"] * 5), "case gen2 cannot be run"),
        ("full/logits", np.ones((3, 7)), "case full cannot be run"),
        ("eos_token_id", np.ones(2, np.int64), "eos_token_id is int64[2], not an id"),
        ("mask_token_id", np.float32(383), "mask_token_id is float32[], not an id"),
    ],
)
def test_an_array_of_another_shape_or_dtype(tmp_path, tiny, capsys, name, value, message):
    goldens = goldens_with(
        tmp_path, tiny, lambda g: g.update({name: value}), cases=("full", "gen2")
    )
    assert message in unusable(tiny, goldens, capsys)


def test_nothing_passes_by_accident():
    assert not Result("full", float("nan")).passed
    assert not Result("full", 2 * TOLERANCE).passed
    assert not Result("gen0", None, tokens_equal=True, forwards_equal=False).passed
    assert case_names({"gen10/x": np.ones(1), "gen9/x": np.ones(1), "full/x": np.ones(1)}) == [
        "full",
        "gen9",
        "gen10",
    ]
    with pytest.raises(CheckpointError):
        read_goldens(Path("absent.npz"))
