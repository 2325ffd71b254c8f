"""Whatever the bytes: rows come, or a BadRow or SourceError says why none does.

`make fuzz` searches for minutes instead of seconds; what it finds becomes an @example.
"""

import contextlib
import functools
import io
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llada2_jax.data import sources
from llada2_jax.data.chat import ChatTemplate, TemplateError, template_of
from llada2_jax.data.encoders import EncodeOptions, make_encoder
from llada2_jax.data.examples import BadRow, decode_record
from llada2_jax.data.prepare import MANIFEST, SPLITS, prepare
from llada2_jax.data.prepared import PreparedDocuments, PreparedError
from llada2_jax.data.sources import SourceSpec, plan, read
from tests.data_helpers import SPECIAL, files, job, texts, write_jsonl
from tests.fuzzing import fuzz, json_values

FORMATS = ("a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.array_record")
TOKENIZER_FILES = ("tokenizer_config.json", "chat_template.jinja")
SHARD = (".npy", ".array_record")

# --------------------------------------------------------------------------------------- lines

line = st.binary(max_size=40) | json_values.map(lambda v: json.dumps(v).encode())


@given(st.lists(line, max_size=12), st.integers(1, 60))
@fuzz
@example([b'{"text": "a"}', b"", b"\r", b"{}"], 1)
@example([b"[" * 100_000], 7)
@example([b"1" * 5000], 7)
@example([b'\xef\xbb\xbf{"text": 1}'], 7)
def test_lines_are_objects_or_bad_rows_wherever_units_are_cut(lines, step):
    data = b"\n".join(x.replace(b"\n", b"") for x in lines)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(data)
        spec = SourceSpec(str(path), "jsonl")
        whole, cut = [], []
        for size, rows in ((1 << 30, whole), (max(step, len(data) // 50), cut)):
            before, sources.UNIT_BYTES = sources.UNIT_BYTES, size
            try:
                units = plan(spec) if data else []
            finally:
                sources.UNIT_BYTES = before
            rows += [row for unit in units for row in read(spec, unit)]
    assert all(row is None or isinstance(row, dict | BadRow) for row in whole)
    assert [str(r) for r in cut] == [str(r) for r in whole]
    assert len(whole) == len(data.split(b"\n")) - (data[-1:] in (b"", b"\n"))


@given(st.binary(max_size=200), st.sampled_from(FORMATS))
@fuzz
def test_files_that_are_not_what_they_say(data, name):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).write_bytes(data)
        try:
            spec = sources.resolve_format(SourceSpec(folder))
            rows = [row for unit in plan(spec) for row in read(spec, unit)]
        except sources.SourceError:
            return
    assert all(row is None or isinstance(row, dict | BadRow) for row in rows)


@functools.cache
def parquet(checksums: bool) -> bytes:
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table({"text": texts(30), "number": list(range(30))})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, row_group_size=9, write_page_checksum=checksums)
    return file.getvalue()


@given(
    st.booleans(),
    st.lists(st.tuples(st.integers(0, 9999), st.integers(1, 255)), min_size=1, max_size=6),
)
@fuzz
def test_flipped_bytes_of_a_parquet_file(checksums, flips):
    data = bytearray(parquet(checksums))
    for place, bits in flips:
        data[place % len(data)] ^= bits
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.parquet"
        path.write_bytes(data)
        spec, rows = SourceSpec(str(path), "parquet"), []
        with contextlib.suppress(sources.SourceError):
            for unit in plan(spec):
                rows += read(spec, unit)
    assert all(isinstance(row, dict | BadRow) for row in rows)


# ---------------------------------------------------------------------------------------- rows

ENCODERS = {
    "text": make_encoder(EncodeOptions("text"), files(), SPECIAL),
    "tokens": make_encoder(EncodeOptions("tokens"), files(), SPECIAL),
    "chat": make_encoder(EncodeOptions("chat", template="llada2"), files(), SPECIAL),
    "preference": make_encoder(EncodeOptions("preference", template="llada2"), files(), SPECIAL),
}


def nested(depth: int) -> str:
    """A JSON text that goes deep: 700 levels can be read, 200,000 cannot."""
    return "[" * depth + "]" * depth


hostile = (
    json_values
    | json_values.map(json.dumps)
    | st.sampled_from([700, 200_000]).map(nested)
    | st.integers(1, 900).map(lambda depth: json.loads(nested(depth)))
    | st.integers(39, 4000).map(lambda digits: 10**digits)
    | st.floats(1e38)
)
call = st.fixed_dictionaries({}, optional={"name": st.just("f"), "arguments": hostile}) | hostile
more_of_an_answer = {
    "weight": st.floats() | hostile,
    "tool_calls": st.lists(call | st.builds(dict, function=call), max_size=3) | hostile,
    "extra": hostile,
}
traps = st.sampled_from(["<|mask|>", "<|role_end|>", "\ud800", "\x00", "{{ 1 }}", "\ue000"])
text = st.text(max_size=12) | traps
message = st.fixed_dictionaries(
    {},
    optional={
        "role": st.sampled_from(["user", "assistant", "system", "tool"]) | json_values,
        "content": text | json_values,
        "from": st.sampled_from(["human", "gpt", "function_call"]) | json_values,
        "value": text | call.map(json.dumps) | hostile,
        **more_of_an_answer,
    },
)
messages = st.lists(message, max_size=5) | hostile
row = st.fixed_dictionaries(
    {},
    optional={
        "text": text | json_values,
        "tokens": st.lists(st.integers(-2, 310), max_size=6) | json_values,
        "loss_mask": st.lists(st.floats(0), max_size=6) | json_values,
        "messages": messages,
        "conversations": messages,
        "prompt": text | messages,
        "chosen": text | messages,
        "rejected": text | messages,
        "system": text | hostile,
        "tools": hostile,
    },
)


def answered(*, tools=None, **fields):
    """A conversation whose answer has more fields."""
    answer = {"role": "assistant", "content": "a", **fields}
    return json.dumps({"messages": [{"role": "user", "content": "q"}, answer], "tools": tools})


# As JSON: hypothesis cannot print what nests deep.
answers = st.fixed_dictionaries({}, optional=more_of_an_answer).map(lambda more: answered(**more))


@pytest.mark.parametrize("content", ENCODERS)
@given(row.map(json.dumps) | answers)
@fuzz
@example(answered(extra=json.loads(nested(700))))
@example(answered(tools="[" * 200_000))
@example(answered(tool_calls=[{"name": "f", "arguments": "[" * 200_000}]))
@example(answered(tool_calls=[json.loads('{"function":' * 700 + "{}" + "}" * 700)]))
@example(answered(weight=10**400))
@example(answered(weight=1e300))
@example('{"tokens": [5], "loss_mask": [1e300]}')
def test_any_row_is_an_example_or_a_bad_row(content, line):
    try:
        result = ENCODERS[content](json.loads(line))
    except BadRow:
        return
    size = len(result.tokens)
    assert size and result.weights.shape == (size,) and 0 <= result.chosen < size
    assert result.tokens.min() >= 0 and result.tokens.max() < 300
    assert not (result.tokens == SPECIAL.mask).any()
    assert np.isfinite(result.weights).all() and (result.weights >= 0).all()
    assert bool(result.chosen) == (content == "preference")
    if content in ("chat", "preference"):
        assert result.weights.any()


conversation = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.sampled_from(["user", "assistant", "tool"]),
            # Special tokens begin with "<", and a message that holds one is a bad row.
            "content": st.text(
                st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=10
            ),
        }
    ),
    min_size=1,
    max_size=6,
).filter(lambda m: any(x["role"] == "assistant" for x in m))


@given(conversation)
@fuzz
def test_what_is_learned_is_what_the_assistant_says(turns):
    """Spelled out from the messages alone, not through a template."""
    example = ENCODERS["chat"]({"messages": turns})
    tokenizer = ENCODERS["chat"].tokenizer
    supervised = example.tokens[example.weights > 0].tolist()
    said = [m["content"] + "<|role_end|>" for m in turns if m["role"] == "assistant"]
    want = "".join(said) + ("<|endoftext|>" if turns[-1]["role"] == "assistant" else "")
    assert tokenizer.decode(supervised, skip_special_tokens=False) == want


# ----------------------------------------------------------------------------------- templates

snippets = st.sampled_from(
    [
        "{{ messages[0].content }}",
        "{% for m in messages %}",
        "{% endfor %}",
        "{% generation %}",
        "{% endgeneration %}",
        "{{ m.content }}",
        "{% if tools %}",
        "{% endif %}",
        "{{ bos_token }}",
        "{{ raise_exception(1) }}",
        "{% set ns = namespace(a=1) %}",
        "{{ messages | tojson }}",
        "{{ strftime_now('%Y') }}",
        "{{ messages[-1].content.strip() | upper }}",
        "{%",
        "}}",
        "x",
    ]
)


@given((st.lists(snippets, max_size=8).map("".join)) | st.text(max_size=20), conversation)
@fuzz
def test_any_template_is_refused_or_renders_turns_in_order(source, turns):
    try:
        rendered = ChatTemplate(source).render_turns(turns)
    except (TemplateError, BadRow):
        return
    bounds = [b for turn in rendered.turns for b in turn]
    assert bounds == sorted(bounds) and all(0 <= b <= len(rendered.text) for b in bounds)
    assert len(rendered.turns) == sum(m["role"] == "assistant" for m in turns)


@given(
    st.dictionaries(
        st.sampled_from(TOKENIZER_FILES), st.text(max_size=30) | json_values.map(json.dumps)
    )
)
@fuzz
def test_any_tokenizer_files_have_a_template_or_an_error(found):
    with contextlib.suppress(TemplateError):
        assert isinstance(template_of(found), ChatTemplate)


# ------------------------------------------------------------------------- records, manifests


@given(st.binary(max_size=60), st.sampled_from(["<u2", "<u4"]))
@fuzz
def test_any_bytes_are_a_record_or_an_error(record, dtype):
    try:
        tokens, weights = decode_record(record, np.dtype(dtype))
    except ValueError:
        return
    assert tokens.shape == weights.shape


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    path = write_jsonl(folder / "a.jsonl", [{"text": t} for t in texts(9)])
    prepare(job(path), folder / "out", processes=1)
    return folder / "out"


@given(st.data())
@fuzz
def test_any_change_of_a_manifest_is_read_or_refused(prepared, data):
    path = prepared / MANIFEST
    good = path.read_text()
    manifest = json.loads(good)
    node, key = manifest, data.draw(st.sampled_from(sorted(manifest)))
    while isinstance(node[key], dict) and node[key] and data.draw(st.booleans()):
        node = node[key]
        key = data.draw(st.sampled_from(sorted(node)))
    if data.draw(st.booleans()):
        node[key] = data.draw(json_values)
    else:
        del node[key]
    try:
        path.write_text(json.dumps(manifest))
        documents = PreparedDocuments(prepared, "train")
        _ = documents.paired, documents.weighted
        for i, n in enumerate(documents.lengths):
            assert len(documents.read(i, 0, int(n))[0]) <= n
    except PreparedError:
        pass
    finally:
        path.write_text(good)


def test_sizes_that_no_array_can_count_with(prepared):
    path = prepared / MANIFEST
    good = path.read_text()
    try:
        path.write_text(json.dumps(json.loads(good) | {"chunk_tokens": 2**70}))
        with pytest.raises(PreparedError, match="is damaged: .* is no size"):
            PreparedDocuments(prepared, "train")
    finally:
        path.write_text(good)


@pytest.fixture(scope="module")
def whole(prepared):
    return read_all(prepared)


def read_all(folder):
    """Every document of both splits, with all that the index says of it."""
    found = []
    for documents in (PreparedDocuments(folder, split) for split in SPLITS):
        for i, n in enumerate(documents.lengths):
            tokens, weights = documents.read(i, 0, int(n))
            spans = documents.chosen, documents.first_supervised, documents.supervised_end
            place = documents.place(i), int(documents.ids[i])
            found.append((place, *(int(s[i]) for s in spans), tokens.tolist(), weights.tolist()))
    return found


@given(st.data(), st.integers(0, 7))
@fuzz
def test_a_flipped_bit_of_an_index_or_a_shard_changes_no_document(prepared, whole, data, bit):
    path = data.draw(st.sampled_from([p for p in sorted(prepared.iterdir()) if p.suffix in SHARD]))
    good = path.read_bytes()
    damaged = bytearray(good)
    damaged[data.draw(st.integers(0, len(good) - 1))] ^= 1 << bit
    try:
        path.write_bytes(damaged)
        assert read_all(prepared) == whole and path.suffix != ".npy"  # bits that nothing reads
    except PreparedError:
        pass
    finally:
        path.write_bytes(good)


@given(st.binary(max_size=300))
@fuzz
def test_any_bytes_for_a_manifest(prepared, data):
    path = prepared / MANIFEST
    good = path.read_bytes()
    try:
        path.write_bytes(data)
        with pytest.raises(PreparedError):
            PreparedDocuments(prepared, "train")
    finally:
        path.write_bytes(good)
