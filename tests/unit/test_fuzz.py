"""Readers of what others wrote: whatever the input, a value or the documented error, nothing else.

What they found is kept as explicit examples; `make fuzz` looks for more.
"""

import contextlib
import json
import struct

import ml_collections
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llada2_jax import checkpoint
from llada2_jax.checkpoint import ArraySpec, CheckpointError, ModelBundle, ParamReader
from llada2_jax.config import ConfigError, TrainConfig, default_config, model_dict
from llada2_jax.config_check import validate
from llada2_jax.config_flags import parse_flags
from llada2_jax.errors import UserError
from llada2_jax.hub.config import config_from_hf, config_to_hf, special_tokens
from llada2_jax.hub.safetensors_files import INDEX, TensorFolder, TensorFolderWriter
from llada2_jax.merge import select_best
from llada2_jax.train_checkpoints import Retention
from llada2_jax.types import SpecialTokens
from tests.fuzzing import fuzz, json_values, scalars
from tests.helpers import TINY

# ---- configs -------------------------------------------------------------------------------------


def base_config() -> ml_collections.ConfigDict:
    config = default_config()
    config.workdir = "runs/x"
    config.schedule.ar_tokens = 10_000
    with config.unlocked():
        config.model = {k: v for k, v in model_dict(TINY).items() if v is not None}
    return config


def field_paths(config, path="") -> list[str]:
    paths = []
    for name, value in config.items():
        child = f"{path}.{name}" if path else name
        paths.append(child)
        if isinstance(value, ml_collections.ConfigDict):
            paths += field_paths(value, child)
    return paths


PATHS = field_paths(base_config())


@fuzz
@given(path=st.sampled_from(PATHS), value=json_values | st.tuples(scalars, scalars))
@example(path="schedule.warmup_blocks", value=3)
@example(path="schedule.decay_blocks", value=(0,))
@example(path="optimizer.learning_rate", value=float("inf"))
@example(path="optimizer.learning_rate", value=10**400)
@example(path="schedule.ar_tokens", value=-1)
@example(path="model", value=[])
@example(path="model.rope_scaling", value={"factor": 2.0})
@example(path="model.n_group", value=3)
def test_a_field_of_any_value(path, value):
    config = base_config()
    *groups, name = path.split(".")
    part = config
    for group in groups:
        part = part[group]
    with config.unlocked():
        try:
            del part[name]
            part[name] = value
        except (TypeError, ValueError, KeyError, AttributeError):
            return  # ml_collections itself refuses it
    try:
        cfg = validate(config)
    except ConfigError as error:
        assert "config" in str(error)
    else:
        assert isinstance(cfg, TrainConfig) and cfg.total_steps > 0


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text("from tests.unit.test_fuzz import base_config as get_config\n")
    return path


# ml_collections loads config files in a way that Python 3.12 deprecates.
@pytest.mark.filterwarnings(r"ignore:the load_module\(\) method is deprecated:DeprecationWarning")
@fuzz
@given(path=st.sampled_from(PATHS), text=st.text(max_size=12) | scalars.map(repr))
@example(path="schedule.decay_blocks", text="(32")
@example(path="schedule.decay_blocks", text="((1,2),)")
@example(path="seed", text="1" * 5000)
def test_an_override_of_any_text(config_file, path, text):
    argv = [f"--config={config_file}", f"--config.{path}={text}"]
    try:
        validate(parse_flags("llada2 train", argv).config)
    except (UserError, OSError) as error:
        assert str(error)


# ---- safetensors ---------------------------------------------------------------------------------


def read_everything(folder) -> None:
    tensors = TensorFolder(folder)
    for name in sorted(tensors.names):
        tensors.read(name)


@pytest.fixture(scope="module")
def tensors(tmp_path_factory) -> bytes:
    """A good file."""
    folder = tmp_path_factory.mktemp("tensors")
    spec = ArraySpec((2, 3), np.dtype(np.float32))
    writer = TensorFolderWriter(folder, {"a": spec, "b": spec}, 1 << 20)
    for name in ("a", "b"):
        writer.write(name, np.ones((2, 3), np.float32))
    writer.finish()
    return (folder / "model.safetensors").read_bytes()


@fuzz
@given(data=st.data())
def test_a_damaged_safetensors_file(tensors, tmp_path_factory, data):
    damaged = bytearray(tensors)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.integers(0, len(damaged)))]
    folder = tmp_path_factory.mktemp("damaged")
    (folder / "model.safetensors").write_bytes(damaged)
    try:
        read_everything(folder)
    except CheckpointError as error:
        assert str(folder) in str(error) or "tensor" in str(error)


entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "BF16", "I8"]) | json_values},
    optional={
        "shape": st.lists(st.integers(-1, 4), max_size=3) | json_values,
        "data_offsets": st.lists(st.integers(-4, 64), min_size=2, max_size=2) | json_values,
    },
)


@fuzz
@given(header=st.dictionaries(st.text(max_size=3), entries | json_values) | json_values)
@example(header=[])
@example(header={"a": {"dtype": [], "shape": [], "data_offsets": [0, 4]}})
@example(header={"a": {"dtype": "F32", "shape": [-1], "data_offsets": [4, 0]}})
@example(header={"a": {"dtype": "I8", "shape": ["x"], "data_offsets": [0, 1]}})
@example(header={"a": {"dtype": "F32", "shape": [1.0], "data_offsets": [0, 4]}})
def test_a_header_of_any_json(tmp_path_factory, header):
    folder = tmp_path_factory.mktemp("header")
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    with contextlib.suppress(CheckpointError):
        read_everything(folder)


def test_a_header_nested_without_end(tmp_path):
    text = b"[" * 200_000
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text)
    with pytest.raises(CheckpointError, match="its header is no JSON"):
        read_everything(tmp_path)


@fuzz
@given(index=json_values | st.fixed_dictionaries({"weight_map": json_values}))
@example(index=[])
@example(index={"weight_map": {"a": "../model.safetensors"}})
@example(index={"weight_map": {"a": 1}})
@example(index={"weight_map": {"a": "x\0"}})
def test_an_index_of_any_json(tmp_path_factory, tensors, index):
    folder = tmp_path_factory.mktemp("index")
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / INDEX).write_text(json.dumps(index))
    try:
        read_everything(folder)
    except CheckpointError as error:
        assert str(folder) in str(error)


# ---- Hugging Face's descriptions -----------------------------------------------------------------

HF = config_to_hf(TINY, SpecialTokens(mask=15, eos=14, pad=13))
YARN = {"type": "yarn", "factor": 2.0}
yarn_fields = ("factor", "beta_fast", "mscale", "mscale_all_dim", "attention_factor", "type")


@fuzz
@given(field=st.sampled_from([*HF, "rope_parameters", "dtype"]), value=json_values)
@example(field="num_attention_heads", value=0)
@example(field="rope_theta", value="abc")
@example(field="rope_scaling", value=YARN | {"original_max_position_embeddings": 10**400})
@example(field="rope_scaling", value=YARN | {"original_max_position_embeddings": 0})
@example(field="rope_scaling", value=YARN | {"mscale": 1, "mscale_all_dim": -14.5})
def test_a_config_json_with_a_field_of_any_json(field, value):
    read(HF | {field: value})


@fuzz
@given(st.dictionaries(st.sampled_from(yarn_fields), scalars))
def test_a_rope_scaling_of_any_json(fields):
    read(HF | {"rope_scaling": YARN | {"original_max_position_embeddings": 2**20} | fields})


def read(hf) -> None:
    try:
        config_from_hf(hf)
    except CheckpointError as error:
        assert "config.json" in str(error)


@fuzz
@given(
    field=st.sampled_from(["mask_token_id", "eos_token_id", "pad_token_id", "vocab_size"]),
    value=json_values,
    name=st.sampled_from(["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]),
    file=json_values
    | st.dictionaries(st.sampled_from(["added_tokens", "model", "mask_token"]), json_values)
    | st.fixed_dictionaries({"added_tokens": st.lists(json_values, max_size=2)}),
)
@example(field="mask_token_id", value="5", name="tokenizer.json", file={})
@example(field="eos_token_id", value=[[]], name="tokenizer.json", file=[])
def test_ids_and_tokenizer_files_of_any_json(field, value, name, file):
    try:
        special = special_tokens(HF | {field: value}, {name: json.dumps(file)})
    except CheckpointError as error:
        assert str(error)
    else:
        assert all(type(i) is int for i in (special.mask, special.eos, special.pad))


# ---- metadata of checkpoints ---------------------------------------------------------------------

BUNDLE = ModelBundle(TINY, None, SpecialTokens(mask=15, eos=14, pad=13), {"tokenizer.json": "{}"})


@fuzz
@given(
    field=st.sampled_from([*BUNDLE.model_item(), "config.num_layers", "config.rope_scaling"]),
    value=json_values,
)
@example(field="config", value=[])
@example(field="config.rope_scaling", value=3)
@example(field="special_tokens", value="ab")
@example(field="generation", value=[3])
def test_a_model_item_with_a_field_of_any_json(field, value):
    item = json.loads(json.dumps(BUNDLE.model_item()))
    group, _, name = field.partition(".")
    if name:
        item[group][name] = value
    else:
        item[group] = value
    try:
        ModelBundle.from_items(item, {})
    except CheckpointError as error:
        assert "model item" in str(error)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "m"
    params = {"a": np.ones((4, 2), np.float32), "b": {"c": np.ones(3, np.float32)}}
    checkpoint.save_model(folder, ModelBundle(TINY, params, BUNDLE.special))
    return folder


FILES = ("params/_METADATA", "params/a/zarr.json", "model/metadata", "tokenizer/metadata")


@fuzz
@given(name=st.sampled_from(FILES), data=st.data())
def test_metadata_with_damage(saved, name, data):
    path = saved / name
    good = path.read_bytes()
    damaged = bytearray(good)
    if data.draw(st.booleans()):
        damaged = bytearray(json.dumps(data.draw(json_values)).encode())
    else:
        for _ in range(data.draw(st.integers(1, 3))):
            damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(damaged)
    try:
        checkpoint.read_bundle(saved)
        ParamReader(saved / "params").read_all()
    except CheckpointError as error:
        assert str(error)
    finally:
        path.write_bytes(good)


@fuzz
@given(item=json_values | st.fixed_dictionaries({"step": scalars, "metrics": json_values}))
@example(item={"step": "x", "metrics": {}})
@example(item={"step": 1, "metrics": []})
@example(item={"step": 1, "metrics": {"validation": 3}})
@example(item={"step": 1, "metrics": {"validation": {"kind": [], "bits_per_byte": 1.0}}})
def test_a_train_item_of_any_json(saved, item):
    folder = saved.parent / "run" / "checkpoints" / "1"
    for part in ("model", "train"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    (folder / "model" / "metadata").write_bytes((saved / "model" / "metadata").read_bytes())
    (folder / "train" / "metadata").write_text(json.dumps(item))
    try:
        select_best(saved.parent / "run", 1)
    except CheckpointError as error:
        assert str(error)


@fuzz
@given(
    st.dictionaries(
        st.integers(0, 50),
        st.fixed_dictionaries({"kind": st.text(max_size=1), "bits_per_byte": scalars}),
        min_size=1,
    ),
    st.integers(1, 4),
    st.integers(0, 4),
    st.integers(0, 9),
)  # fmt: skip
def test_the_newest_is_always_kept(scores, last, best, every):
    kept = Retention(last, best, every).kept(scores)
    assert set(sorted(scores)[-last:]) <= kept <= set(scores)
