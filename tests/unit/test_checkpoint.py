"""Our checkpoint directories: whole, self-contained, and the same to Orbax and to us."""

import dataclasses
import json
import math
import os
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llada2_jax import checkpoint, folders, merge
from llada2_jax.checkpoint import ArraySpec, CheckpointError, ModelBundle
from llada2_jax.hub import load_bundle, load_model
from llada2_jax.model import init_params, merge_params
from llada2_jax.types import RopeScaling, SpecialTokens
from tests.helpers import assert_same_params, config

CONFIG = config(vocab_size=24, num_layers=3, rope_scaling=RopeScaling(2.0, 64))


@pytest.fixture(scope="module")
def bundle() -> ModelBundle:
    return ModelBundle(
        config=CONFIG,
        params=init_params(CONFIG, 0),
        special=SpecialTokens(mask=23, eos=22, pad=21),
        tokenizer_files={"tokenizer.json": "{}", "chat_template.jinja": "ä\n"},
        generation={"block_size": 32, "threshold": 0.9},
        hf_config={"model_type": "llada2_moe"},
        provenance={"step": 3},
    )


def save_with_orbax(path, bundle: ModelBundle, chunk_bytes: int = 1 << 20, train=None) -> None:
    """A model checkpoint as the training loop writes it."""
    tree = checkpoint.nest(checkpoint.flatten(bundle.params))
    chunked = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree)
    items = {
        "params": ocp.args.PyTreeSave(tree, save_args=chunked),
        "model": ocp.args.JsonSave(bundle.model_item()),
        "tokenizer": ocp.args.JsonSave(bundle.tokenizer_item()),
    }
    if train is not None:
        items["train"] = ocp.args.JsonSave(train)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, ocp.args.Composite(**items))


def test_what_was_saved_comes_back(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    loaded = load_model(tmp_path / "m")
    assert_same_params(loaded.params, bundle.params)
    assert dataclasses.replace(loaded, params=None) == dataclasses.replace(bundle, params=None)
    merge_params(loaded.config, loaded.params)
    assert load_bundle(tmp_path / "m").params is None


def test_orbax_restores_what_we_write(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    tree = checkpoint.nest(checkpoint.flatten(bundle.params))
    with ocp.PyTreeCheckpointer() as reader:
        plain = reader.restore(tmp_path / "m" / "params")
    assert_same_params(jax.tree.map(np.asarray, tree), plain)
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
        items = reader.restore(
            tmp_path / "m",
            ocp.args.Composite(
                params=ocp.args.StandardRestore(abstract),
                model=ocp.args.JsonRestore(),
                tokenizer=ocp.args.JsonRestore(),
            ),
        )
    assert_same_params(tree, items.params)
    assert ModelBundle.from_items(items.model, items.tokenizer).special == bundle.special


def test_we_read_what_orbax_writes(tmp_path, bundle):
    save_with_orbax(tmp_path / "m", bundle)
    assert_same_params(load_model(tmp_path / "m").params, bundle.params)


def test_overrides_change_the_config_and_the_dtype(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    loaded = load_model(tmp_path / "m", param_dtype="bfloat16", remat="full")
    assert loaded.config.remat == "full"
    assert checkpoint.flatten(loaded.params)["embedding"].dtype == jax.numpy.bfloat16
    for override, message in (
        ({"hidden": 3}, r"config\.hidden is not a field"),
        ({"attention_backend": "nope"}, r"attention_backend is 'nope'; choose one of auto"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of bfloat16"),
        ({"remat": "x"}, "remat is 'x'; choose one of none"),
        ({"num_layers": "3"}, "num_layers='3' must be of type int"),
    ):
        with pytest.raises(CheckpointError, match=message):
            load_model(tmp_path / "m", **override)
    with pytest.raises(CheckpointError, match=r"embedding has shape \(24, 16\).*\(25, 16\)"):
        load_model(tmp_path / "m", vocab_size=25)


def test_a_run_is_not_a_checkpoint(tmp_path, bundle):
    save_with_orbax(tmp_path / "checkpoints" / "5", bundle)
    save_with_orbax(tmp_path / "checkpoints" / "10", bundle)
    assert list(folders.step_folders(tmp_path)) == [5, 10]
    with pytest.raises(CheckpointError, match=r"is a run.*\{5,10\}.*llada2 merge"):
        load_model(tmp_path)


RUN = {"config.json": '{"workdir": "runs/x"}'}
EXPORT = {"config.json": '{"model_type": "llada2_moe"}', "tokenizer.json": "{}"}


def write(folder, files):
    """A folder with files, {path: text}."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_a_run_without_checkpoints_is_a_run(tmp_path):
    run = write(tmp_path, RUN)
    for load in (load_model, lambda path: merge.expand([path])):
        with pytest.raises(CheckpointError, match="is a run without checkpoints"):
            load(run)


def test_a_run_with_its_config_is_not_taken_for_a_hugging_face_folder(tmp_path, bundle):
    run = write(tmp_path, RUN)
    save_with_orbax(run / "checkpoints" / "5", bundle)
    with pytest.raises(CheckpointError, match=r"is a run, not a checkpoint.*\{5\}"):
        load_model(run)


def test_a_hugging_face_folder_is_converted_before_it_is_merged(tmp_path):
    with pytest.raises(CheckpointError, match="Hugging Face folder.*llada2 convert"):
        merge.expand([write(tmp_path, EXPORT)])


def test_paths_that_are_nothing(tmp_path):
    with pytest.raises(CheckpointError, match="no such directory"):
        load_model(tmp_path / "absent")
    with pytest.raises(CheckpointError, match=r"neither model/metadata .* nor config\.json"):
        load_model(tmp_path)


def chunk_file(folder):
    return next(p for p in (folder / "params" / "embedding").rglob("c/*/*") if p.is_file())


def test_a_flipped_bit_is_noticed(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    data = bytearray(chunk_file(tmp_path / "m").read_bytes())
    data[100] ^= 1
    chunk_file(tmp_path / "m").write_bytes(data)
    with pytest.raises(CheckpointError, match="parameter embedding: DATA_LOSS"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("damage", ["absent", "truncated"])
def test_damaged_arrays_are_errors_that_name_them(tmp_path, bundle, damage):
    checkpoint.save_model(tmp_path / "m", bundle)
    file = chunk_file(tmp_path / "m")
    data = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="parameter embedding"):
        load_model(tmp_path / "m")


def test_a_missing_item_is_named(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    (tmp_path / "m" / "params" / "_METADATA").unlink()
    with pytest.raises(CheckpointError, match="_METADATA is missing"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format_version is 99"),
        ({"special_tokens": {"mask": 1}}, "special_tokens"),
        ({"config": {"hidden": 3}}, r"config\.hidden is not a field"),
        ({"config": {}}, r"config\.vocab_size is missing"),
    ],
)
def test_a_model_item_from_elsewhere_is_refused(bundle, change, message):
    with pytest.raises(CheckpointError, match=message):
        ModelBundle.from_items(bundle.model_item() | change, {})


def test_the_model_item_is_json(bundle):
    item = json.loads(json.dumps(bundle.model_item()))
    again = ModelBundle.from_items(item, bundle.tokenizer_item())
    assert again == dataclasses.replace(bundle, params=None)


def test_nothing_half_written(tmp_path, bundle):
    class Odd:
        """An array that cannot be read."""

        shape, dtype = (2, 2), np.dtype(np.float32)

        def __array__(self, dtype=None, copy=None):
            raise RuntimeError("lost")

    broken = dataclasses.replace(bundle, params={"a": np.ones((2, 2), np.float32), "b": Odd()})
    with pytest.raises(RuntimeError, match="lost"):
        checkpoint.save_model(tmp_path / "m", broken)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_stays_unless_told(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    changed = dataclasses.replace(bundle, generation={"block_size": 4})
    with pytest.raises(CheckpointError, match="exists"):
        checkpoint.save_model(tmp_path / "m", changed)
    assert load_bundle(tmp_path / "m").generation == bundle.generation
    checkpoint.save_model(tmp_path / "m", changed, overwrite=True)
    assert load_bundle(tmp_path / "m").generation == {"block_size": 4}
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_every_file_is_on_disk_before_the_model_has_its_name(tmp_path, bundle, monkeypatch):
    """Or a power loss leaves empty files in a model that looks whole."""
    fsync, rename, synced, left = os.fsync, os.rename, set(), []

    def noted(descriptor):
        fsync(descriptor)
        synced.add(os.fstat(descriptor).st_ino)

    def renamed(source, target):
        files = [p for p in Path(source).rglob("*") if p.is_file()]
        assert files
        left.extend(p.name for p in files if p.stat().st_ino not in synced)
        rename(source, target)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "rename", renamed)
    checkpoint.save_model(tmp_path / "model", bundle)
    assert (tmp_path / "model/model/metadata").is_file() and left == []


def test_a_run_or_a_step_is_never_overwritten(tmp_path, bundle):
    save_with_orbax(tmp_path / "run" / "checkpoints" / "5", bundle, train={"step": 5})
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    for path in ("run", "run/checkpoints", "run/checkpoints/5", "other"):
        with pytest.raises(CheckpointError, match="remove it yourself"):
            checkpoint.save_model(tmp_path / path, bundle, overwrite=True)
    assert load_bundle(tmp_path / "run/checkpoints/5").config == CONFIG


FOLDERS = {
    "metrics.jsonl": RUN | {"metrics.jsonl": ""},
    "src": {"config.json": "{}", "src/thesis.tex": "the only copy"},
    "thesis.tex": EXPORT | {"model.safetensors": "", "thesis.tex": "the only copy"},
    "tokenizer.json": EXPORT,  # no weights
    "config.json": {"config.json": "{}", "model.safetensors": ""},
}


@pytest.mark.parametrize("named", FOLDERS)
def test_a_folder_that_is_more_than_a_model_is_never_overwritten(tmp_path, bundle, named):
    folder = write(tmp_path / "f", FOLDERS[named])
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=rf"not replaced: it holds .*{named}.*yourself"):
        checkpoint.save_model(folder, bundle, overwrite=True)
    assert sorted(folder.rglob("*")) == before


def test_a_note_beside_a_checkpoint_is_not_lost(tmp_path, bundle):
    checkpoint.save_model(tmp_path / "m", bundle)
    (tmp_path / "m" / "notes.md").touch()
    with pytest.raises(CheckpointError, match=r"it holds notes\.md too"):
        checkpoint.save_model(tmp_path / "m", bundle, overwrite=True)
    assert (tmp_path / "m" / "notes.md").exists()


def test_either_format_replaces_the_other(tmp_path, bundle):
    weights = dict.fromkeys(
        ("model-00001-of-00001.safetensors", "model.safetensors.index.json"), ""
    )
    folder = write(tmp_path / "m", EXPORT | weights)
    for _ in range(2):
        checkpoint.save_model(folder, bundle, overwrite=True)
    assert load_bundle(folder).special == bundle.special


@given(
    shape=st.lists(st.integers(1, 9), max_size=4).map(tuple),
    limit=st.integers(1, 4000),
)
def test_chunks_cover_an_array_once_within_the_limit(shape, limit):
    spec = ArraySpec(shape, np.dtype(np.float32))
    chunk = checkpoint.chunk_shape(spec, limit)
    assert math.prod(chunk) * 4 <= max(limit, 4)
    seen = np.zeros(shape, int)
    for box in checkpoint.boxes(shape, chunk):
        seen[box] += 1
    assert (seen == 1).all()


@given(data=st.data(), limit=st.integers(1, 4000))
def test_chunks_are_made_of_whole_grains(data, limit):
    shape = data.draw(st.lists(st.integers(1, 9), max_size=4).map(tuple))
    grain = tuple(data.draw(st.integers(1, size)) for size in shape)
    chunk = checkpoint.chunk_shape(ArraySpec(shape, np.dtype(np.float32)), limit, grain)
    assert math.prod(chunk) * 4 <= max(limit, math.prod(grain) * 4)
    for size, got, unit in zip(shape, chunk, grain, strict=True):
        assert got == size or got % unit == 0


def test_a_chunk_holds_whole_slices_of_the_leading_axes():
    spec = ArraySpec((19, 256, 2048, 2, 512), np.dtype(np.float16))
    assert checkpoint.chunk_shape(spec) == (1, 16, 2048, 2, 512)
