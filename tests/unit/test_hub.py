"""Hugging Face folders in and out: names, shapes, dtypes and bits, and what is refused."""

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open

from llada2_jax import checkpoint, cli
from llada2_jax.checkpoint import ArraySpec, CheckpointError
from llada2_jax.hub import load_bundle, load_model, names, param_shapes
from llada2_jax.hub.safetensors_files import INDEX, TensorFolder, TensorFolderWriter
from llada2_jax.hub.streaming import Options, convert
from llada2_jax.model import build
from llada2_jax.types import SpecialTokens

BF16 = np.dtype(ml_dtypes.bfloat16)
MASK = 23

# 4 layers (2 dense), 4 experts in 2 groups, 2 shared experts.
HF_CONFIG = {
    "model_type": "llada2_moe",
    "architectures": ["LLaDA2MoeModelLM"],
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 24,
    "moe_intermediate_size": 8,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_shared_experts": 2,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 2,
    "routed_scaling_factor": 2.5,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "partial_rotary_factor": 0.5,
    "max_position_embeddings": 128,
    "pad_token_id": 22,
    "mask_token_id": MASK,
    "torch_dtype": "bfloat16",
    "something_of_theirs": {"kept": True},
}


def tensors_of(cfg, seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under Hugging Face's names: bfloat16, the router's bias fp32."""
    rng, tensors = np.random.default_rng(seed), {}
    for part in names.hf_order(cfg):
        for source in part.sources:
            dtype = np.dtype(np.float32) if source.name.endswith("expert_bias") else BF16
            tensors[source.name] = rng.standard_normal(part.shape).astype(dtype)
    return tensors


def write_tensors(folder: Path, tensors: dict[str, np.ndarray], shard_bytes: int = 10**9) -> None:
    specs = {name: ArraySpec(value.shape, value.dtype) for name, value in tensors.items()}
    writer = TensorFolderWriter(folder, specs, shard_bytes)
    for name, value in tensors.items():
        writer.write(name, value)
    writer.finish()


def write_folder(
    folder: Path, tensors=None, shard_bytes: int = 10**9, files=None, **config
) -> Path:
    """A Hugging Face folder of HF_CONFIG with changes (None: without the field)."""
    hf = {key: value for key, value in (HF_CONFIG | config).items() if value is not None}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf))
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    if tensors is None:
        tensors = tensors_of(load_bundle(folder).config)
    write_tensors(folder, tensors, shard_bytes)
    return folder


def read_with_library(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """{name: (dtype, shape, bytes)}, read by the safetensors library."""
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "flax") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a dict)
                value = np.asarray(tensors.get_tensor(name))
                found[name] = (str(value.dtype), value.shape, value.tobytes())
    return found


def tokenizer(added: dict[str, int], **config) -> dict[str, str]:
    tokens = [{"id": i, "content": text, "special": True} for text, i in added.items()]
    return {
        "tokenizer.json": json.dumps({"model": {"vocab": {"a": 0}}, "added_tokens": tokens}),
        "tokenizer_config.json": json.dumps(config),
    }


# ---- round trips ---------------------------------------------------------------------------------


@pytest.mark.parametrize("shard_bytes", [10**9, 4000])
def test_bits_survive_the_round_trip(tmp_path, shard_bytes):
    files = tokenizer({"<|mask|>": MASK}) | {"chat_template.jinja": "{{ x }}\r\nä"}
    source = write_folder(tmp_path / "hf", shard_bytes=shard_bytes)
    for name, text in files.items():
        (source / name).write_text(text, newline="")
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", Options(shard_bytes=shard_bytes))
    assert read_with_library(tmp_path / "back") == read_with_library(source)
    assert (tmp_path / "back" / INDEX).exists() == (shard_bytes == 4000)
    for name in files:
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config == HF_CONFIG | {"eos_token_id": 22}


def test_any_bit_pattern_survives(tmp_path):
    tensors = tensors_of(load_bundle(write_folder(tmp_path / "seed")).config)
    rng = np.random.default_rng(0)
    for name, value in tensors.items():
        if value.dtype == BF16:  # NaNs with payloads, infinities, subnormals, negative zeros
            noise = rng.integers(0, 1 << 16, value.shape, np.uint16)
            tensors[name] = noise.view(BF16)
    source = write_folder(tmp_path / "hf", tensors)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert read_with_library(tmp_path / "back") == read_with_library(source)


def test_goldens_round_trip(tmp_path, golden_checkpoint):
    convert(golden_checkpoint, tmp_path / "ours", Options(mask_id=383))
    convert(tmp_path / "ours", tmp_path / "back")
    assert read_with_library(tmp_path / "back") == read_with_library(golden_checkpoint)
    theirs = load_model(golden_checkpoint, mask_id=383)
    for again in (load_model(tmp_path / "ours"), load_model(tmp_path / "back")):
        assert again.config == theirs.config and again.special == theirs.special
        jax.tree.map(np.testing.assert_array_equal, again.params, theirs.params)


def test_dfactory_layout_is_read_and_the_released_one_written(tmp_path):
    source = write_folder(tmp_path / "hf")
    tensors = tensors_of(load_bundle(source).config)
    merged = {name: value for name, value in tensors.items() if ".experts." not in name}
    for layer in (2, 3):
        for part in ("gate", "up", "down"):
            stem = f"model.layers.{layer}.mlp.experts"
            each = [tensors[f"{stem}.{e}.{part}_proj.weight"] for e in range(4)]
            merged[f"{stem}.{part}_proj"] = np.stack(each)
    other = write_folder(tmp_path / "merged", merged, model_type="llada2_moe_veomni")
    jax.tree.map(np.testing.assert_array_equal, load_model(source).params, load_model(other).params)
    convert(other, tmp_path / "back", Options(to="hf"))
    assert read_with_library(tmp_path / "back") == read_with_library(source)
    assert load_bundle(tmp_path / "back").hf_config["model_type"] == "llada2_moe"


def test_mtp_tensors_are_dropped_and_named(tmp_path, capsys):
    tensors = tensors_of(load_bundle(write_folder(tmp_path / "plain")).config)
    extra = {f"model.layers.4.{name}.weight": np.ones(3, BF16) for name in ("enorm", "eh_proj")}
    source = write_folder(tmp_path / "hf", tensors | extra, num_nextn_predict_layers=1)
    assert cli.main(["convert", str(source), str(tmp_path / "ours")]) == 0
    assert "dropped 2 tensors" in (out := capsys.readouterr().out)
    assert "  model.layers.4.* (2)\n" in out
    provenance = load_bundle(tmp_path / "ours").provenance
    assert provenance["conversion"]["dropped_tensors"] == sorted(extra)
    convert(tmp_path / "ours", tmp_path / "back")
    assert load_bundle(tmp_path / "back").hf_config["num_nextn_predict_layers"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"num_shared_experts": 0},
        {"tie_word_embeddings": True},
        {"first_k_dense_replace": 0},
        {"first_k_dense_replace": 4},
    ],
)
def test_the_table_has_every_parameter_in_its_shape(tmp_path, changes):
    source = write_folder(tmp_path / "hf", **changes)
    model = load_model(source)
    abstract = build(model.config)[1]
    assert jax.tree.structure(model.params) == jax.tree.structure(abstract)
    jax.tree.map(lambda a, b: a.shape == b.shape or pytest.fail(f"{a} {b}"), model.params, abstract)
    convert(source, tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back")
    assert read_with_library(tmp_path / "back") == read_with_library(source)


def test_dtype_option_and_the_way_back_to_the_source_dtype(tmp_path):
    source = write_folder(tmp_path / "hf")
    convert(source, tmp_path / "ours", Options(dtype="float32"))
    specs = checkpoint.ParamReader(tmp_path / "ours" / "params").specs
    assert {spec.dtype.name for spec in specs.values()} == {"float32"}
    convert(tmp_path / "ours", tmp_path / "back")
    assert read_with_library(tmp_path / "back") == read_with_library(source)
    convert(tmp_path / "ours", tmp_path / "half", Options(dtype="float16"))
    back = read_with_library(tmp_path / "half")
    assert back["lm_head.weight"][0] == "float16"
    assert back["model.layers.2.mlp.gate.expert_bias"][0] == "float32"
    assert load_bundle(tmp_path / "half").hf_config["torch_dtype"] == "float16"


def test_float16_does_not_overflow_in_silence(tmp_path):
    tensors = tensors_of(load_bundle(write_folder(tmp_path / "seed")).config)
    tensors["lm_head.weight"][0, 0] = 1e30
    source = write_folder(tmp_path / "hf", tensors)
    with pytest.raises(CheckpointError, match=r"head exceeds the range of float16"):
        convert(source, tmp_path / "ours", Options(dtype="float16"))


def test_safetensors_of_the_library_are_read(tmp_path):
    value = np.arange(6, dtype=np.float32).reshape(2, 3)
    safetensors.numpy.save_file({"x": value, "y": value[0]}, tmp_path / "model.safetensors")
    folder = TensorFolder(tmp_path)
    np.testing.assert_array_equal(folder.read("x"), value)
    np.testing.assert_array_equal(folder.read("x", 1), value[1])
    assert folder.names == {"x", "y"} and folder.shape("y") == (3,)


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("good") / "hf")


def refused(tmp_path: Path, source: Path, options: Options | None = None) -> str:
    """The error's text; checks that the conversion left nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out", options or Options())
    assert sorted(tmp_path.iterdir()) == before
    return str(caught.value)


def changed(tmp_path: Path, good: Path, change) -> Path:
    """A copy of the good folder, its tensors changed in place by `change`."""
    tensors = tensors_of(load_bundle(good).config)
    change(tensors)
    return write_folder(tmp_path / "bad", tensors)


EXPERT = "model.layers.3.mlp.experts.1.up_proj.weight"


def test_missing_tensor(tmp_path, good_folder):
    source = changed(tmp_path, good_folder, lambda t: t.pop(EXPERT))
    assert f"missing: {EXPERT}" in refused(tmp_path, source)


def test_extra_tensor(tmp_path, good_folder):
    source = changed(tmp_path, good_folder, lambda t: t.update(odd=np.ones(2, BF16)))
    assert "not expected: odd" in refused(tmp_path, source)


def test_a_layer_that_the_config_leaves_out_is_no_mtp_layer(tmp_path, good_folder):
    tensors = tensors_of(load_bundle(good_folder).config)
    source = write_folder(tmp_path / "hf", tensors, num_hidden_layers=3)
    assert "not expected: model.layers.3." in refused(tmp_path, source)
    with pytest.raises(CheckpointError, match=r"not expected: model\.layers\.3\."):
        load_model(source)


def test_misshapen_tensor(tmp_path, good_folder):
    source = changed(tmp_path, good_folder, lambda t: t.update({EXPERT: np.ones((16, 8), BF16)}))
    message = refused(tmp_path, source)
    assert f"{EXPERT} has shape (16, 8)" in message and "(8, 16)" in message


def test_tensors_of_one_array_in_two_dtypes(tmp_path, good_folder):
    def change(tensors):
        tensors[EXPERT] = tensors[EXPERT].astype(np.float32)

    message = refused(tmp_path, changed(tmp_path, good_folder, change))
    assert "differ in dtype" in message and EXPERT in message


def test_integer_tensor(tmp_path, good_folder):
    source = changed(tmp_path, good_folder, lambda t: None)
    file = source / "model.safetensors"
    data = file.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    header[EXPERT]["dtype"] = "I16"  # as many bytes as bfloat16
    text = json.dumps(header, separators=(",", ":")).encode().ljust(size)
    file.write_bytes(data[:8] + text + data[8 + size :])
    assert f"{EXPERT} has dtype I16" in refused(tmp_path, source)


@pytest.mark.parametrize("keep", [4, 100, -10])
def test_truncated_file(tmp_path, good_folder, keep):
    source = changed(tmp_path, good_folder, lambda t: None)
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    message = refused(tmp_path, source)
    assert "truncated" in message and "model.safetensors" in message


def test_file_of_the_index_is_absent(tmp_path, good_folder):
    source = write_folder(tmp_path / "bad", shard_bytes=4000)
    gone = sorted(source.glob("*.safetensors"))[2]
    gone.unlink()
    assert gone.name in refused(tmp_path, source)


def test_tensor_of_the_index_is_absent(tmp_path, good_folder):
    source = write_folder(tmp_path / "bad", shard_bytes=4000)
    index = json.loads((source / INDEX).read_text())
    index["weight_map"]["odd"] = index["weight_map"]["lm_head.weight"]
    (source / INDEX).write_text(json.dumps(index))
    assert "tensor odd is not in" in refused(tmp_path, source)


def test_tensor_in_two_files(tmp_path, good_folder):
    source = changed(tmp_path, good_folder, lambda t: None)
    shutil.copy(source / "model.safetensors", source / "other.safetensors")
    assert "is in model.safetensors too" in refused(tmp_path, source)


def test_damage_found_midway_leaves_nothing(tmp_path, good_folder):
    convert(good_folder, tmp_path / "ours")
    file = next(p for p in (tmp_path / "ours/params/final_norm.scale/c").rglob("*") if p.is_file())
    file.write_bytes(file.read_bytes()[:-1])
    assert "parameter final_norm/scale" in refused(tmp_path, tmp_path / "ours")


def test_existing_target(tmp_path, good_folder):
    (tmp_path / "out").mkdir()
    assert "exists" in refused(tmp_path, good_folder)


# ---- the mask ------------------------------------------------------------------------------------


def ar_folder(tmp_path: Path, **changes) -> Path:
    files = tokenizer({"<|reserved_7|>": MASK, "<|role_end|>": 20, "<|endoftext|>": 22})
    config = {"model_type": "bailing_moe_v2", "mask_token_id": None} | changes
    tensors = tensors_of(load_bundle(write_folder(tmp_path / "plain")).config)
    return write_folder(tmp_path / "ar", tensors, files=files, **config)


@pytest.mark.parametrize("how", ["keep", "mean", "random"])
def test_the_mask_row_of_an_ar_model(tmp_path, how):
    source = ar_folder(tmp_path)
    report = convert(source, tmp_path / "ours", Options(mask_id=MASK, mask_init=how))
    assert report["mask"]["meant_before"] == "<|reserved_7|>"
    assert load_bundle(tmp_path / "ours").provenance["conversion"] == report
    before, after = (
        np.asarray(checkpoint.flatten(load_model(path, **ids, dtype="float32").params)["embedding"])
        for path, ids in ((source, {"mask_id": MASK}), (tmp_path / "ours", {}))
    )
    np.testing.assert_array_equal(np.delete(before, MASK, 0), np.delete(after, MASK, 0))
    same = np.array_equal(before[MASK], after[MASK])
    assert same == (how == "keep")
    assert report["mask"]["norm_after"] == pytest.approx(
        float(np.linalg.norm(after[MASK].astype(np.float32)))
    )
    if how == "mean":
        mean = np.delete(before.astype(np.float32), MASK, 0).mean(0)
        np.testing.assert_array_equal(after[MASK], mean.astype(BF16))


def test_export_of_a_converted_model_is_llada2(tmp_path):
    convert(ar_folder(tmp_path), tmp_path / "ours", Options(mask_id=MASK))
    convert(tmp_path / "ours", tmp_path / "back", Options(model_type="llada2_moe"))
    hf = load_bundle(tmp_path / "back").hf_config
    assert hf["model_type"] == "llada2_moe" and hf["architectures"] == ["LLaDA2MoeModelLM"]
    assert load_bundle(tmp_path / "back").config == load_bundle(tmp_path / "ours").config


def test_the_mask_row_of_llada2_stays(tmp_path, good_folder):
    assert "is for AR models" in refused(tmp_path, good_folder, Options(mask_init="mean"))


def test_no_mask_id(tmp_path):
    source = ar_folder(tmp_path)
    assert "give --mask-id" in refused(tmp_path, source)


def test_role_end_is_no_mask(tmp_path):
    source = ar_folder(tmp_path)
    message = refused(tmp_path, source, Options(mask_id=20))
    assert "20 is '<|role_end|>'" in message


def test_tokenizer_decides_the_mask(tmp_path):
    files = tokenizer({"<|mask|>": 19})
    source = write_folder(tmp_path / "hf", files=files, mask_token_id=None)
    assert load_bundle(source).special.mask == 19
    message = refused(tmp_path, source, Options(mask_id=20))
    assert "'<|mask|>' is 19" in message


def test_another_tokenizer_can_be_named(tmp_path):
    source = ar_folder(tmp_path)
    other = tmp_path / "tokenizer"
    other.mkdir()
    for name, text in tokenizer({"<|mask|>": 20}).items():
        (other / name).write_text(text)
    convert(source, tmp_path / "ours", Options(tokenizer=other))
    bundle = load_bundle(tmp_path / "ours")
    assert bundle.special.mask == 20
    assert bundle.tokenizer_files["tokenizer.json"] == (other / "tokenizer.json").read_text()


def test_the_readme_s_way_from_an_ar_parent(tmp_path, monkeypatch):
    """Its own line: another model's whole folder gives the tokenizer, and with it the mask."""
    parent = ar_folder(tmp_path)
    entries = {"<|mask|>": 19, "<|endoftext|>": 22}
    parent.rename(tmp_path / "Ling-mini-base-2.0")
    write_folder(tmp_path / "LLaDA2.0-mini", files=tokenizer(entries), mask_token_id=19)
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [line] = [x for x in readme.splitlines() if x.startswith("llada2 convert Ling")]
    monkeypatch.chdir(tmp_path)
    command, *argv = shlex.split(line, comments=True)
    assert command == "llada2" and cli.main(argv) == 0
    bundle = load_model("ling-orbax")
    assert bundle.special == SpecialTokens(mask=19, eos=22, pad=22)
    assert bundle.hf_config["model_type"] == "bailing_moe_v2"
    theirs = (tmp_path / "LLaDA2.0-mini" / "tokenizer.json").read_text()
    assert bundle.tokenizer_files["tokenizer.json"] == theirs
    embeddings = [
        np.asarray(checkpoint.flatten(load_model(folder, **ids).params)["embedding"])
        for folder, ids in (("Ling-mini-base-2.0", {"mask_id": 19}), ("ling-orbax", {}))
    ]
    np.testing.assert_array_equal(*embeddings)  # kept: another start is --mask-init's to choose


# ---- the command ---------------------------------------------------------------------------------


def test_errors_are_one_line(tmp_path, capsys):
    assert cli.main(["convert", str(tmp_path / "absent"), str(tmp_path / "out")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("llada2 convert: error: ") and error.count("\n") == 1


@pytest.mark.parametrize("size", ["5GB", "1.5M", "4000"])
def test_sizes(size):
    from llada2_jax.convert import parse_size

    assert parse_size(size) == {"5GB": 5 * 10**9, "1.5M": 1_500_000, "4000": 4000}[size]


def test_a_bad_size_is_refused(capsys):
    with pytest.raises(SystemExit):
        cli.main(["convert", "a", "b", "--shard-size", "big"])
    assert "write 5GB" in capsys.readouterr().err


# ---- memory --------------------------------------------------------------------------------------

_MEASURE = """
import resource, sys
from pathlib import Path
from llada2_jax import checkpoint
from llada2_jax.hub import streaming
# Small enough that what is constant does not hide what grows.
checkpoint.CACHE_BYTES, checkpoint.CHUNK_BYTES = 4 << 20, 2 << 20
warm, source, ours, back = map(Path, sys.argv[1:])
streaming.convert(warm, ours.with_name("warm"), streaming.Options())
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
start = peak()
streaming.convert(source, ours, streaming.Options())
print(peak() - start)
streaming.convert(ours, back, streaming.Options())
print(peak() - start)
"""


def test_memory_does_not_grow_with_the_model(tmp_path, good_folder):
    growth = {}
    for layers in (3, 9):
        changes = {
            "num_hidden_layers": layers,
            "hidden_size": 256,
            "moe_intermediate_size": 1024,
            "num_experts": 8,
        }
        cfg = dataclasses.replace(
            load_bundle(good_folder).config,
            num_layers=layers,
            hidden_size=256,
            moe_intermediate_size=1024,
            num_experts=8,
        )
        tensors = {
            source.name: np.zeros(part.shape, np.float32)  # zeros are lazy: cheap to make
            for part in names.hf_order(cfg)
            for source in part.sources
        }
        source = write_folder(tmp_path / f"hf{layers}", tensors, torch_dtype="float32", **changes)
        size = sum(int(np.prod(shape)) * 4 for shape in param_shapes(cfg).values())
        paths = [good_folder, source, tmp_path / f"ours{layers}", tmp_path / f"back{layers}"]
        out = subprocess.run(
            [sys.executable, "-c", _MEASURE, *map(str, paths)],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        growth[layers] = size, max(map(int, out.stdout.split()))
        for path in [source, *tmp_path.glob("ours*"), *tmp_path.glob("back*")]:
            shutil.rmtree(path)
        shutil.rmtree(tmp_path / "warm")
    (small, small_peak), (large, large_peak) = growth.values()
    assert large > 4 * small > 2**26
    assert large_peak - small_peak < (large - small) / 4, growth
