"""Choosing a backend, and tokamax's splash attention under the contract."""

import dataclasses
import functools
import importlib.metadata
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, use_abstract_mesh
from tokamax._src.ops.experimental.tpu.splash_attention import splash_attention_mask_info

from pallas_kernels import selection
from pallas_kernels.block_attention import (
    BACKENDS,
    api,
    attend_reference,
    block_attention,
)
from pallas_kernels.block_attention import self_check as checking
from pallas_kernels.block_attention.self_check import PREFERENCES, rows_of, select, self_check
from pallas_kernels.block_attention.splash import LONGEST, attend_splash, computed_pairs
from pallas_kernels.block_layout import CLEAN, NOISY, concatenate, half_layout, key_intervals
from pallas_kernels.shapes import packed_layout
from tests.kernels.contract import AttentionContract, Case, output_and_gradients

DEVICE = jax.local_devices()[0]


class TestSplash(AttentionContract):
    """The whole contract, with each value of a factor in one case at least: compiling splash in
    interpret mode takes seconds for each."""

    cases = (
        Case("tiny", "both", "float32", 32, "straddling", "document", 21),
        Case("tiny", "both", "float32", 4, "one_token", "row", 0),
        Case("tiny", "both", "float32", 64, "none", "document", 0),
        Case("mini", "clean", "bfloat16", 1, "aligned", "document", 21),
        Case("flash", "noisy", "float32", "row", "many_tiny", "row", 0),
    )

    @staticmethod
    def attend(q, k, v, layout):
        return attend_splash(q, k, v, layout, tile=128, interpret=True)


def test_splash_prunes_each_row_by_its_own_documents():
    def layout(rows, documents):
        rng = np.random.default_rng(0)
        return packed_layout(rng, rows, 2048, documents, block_size=32)

    def pairs(layout):
        return computed_pairs(key_intervals(layout), 4096)

    whole, short = pairs(layout(1, "none")), pairs(layout(1, "one_token"))
    # 4 tiles of 512 a half: noisy on its diagonal, and the triangle twice.
    assert whole == ((4 + 10 + 10) * 512**2,) * 2
    assert short == ((4 + 0 + 4) * 512**2,) * 2  # no token has an earlier one
    mixed = concatenate_rows(layout(1, "none"), layout(1, "one_token"))
    assert pairs(mixed)[0] == whole[0] + short[0]


def concatenate_rows(*layouts):
    return jax.tree.map(lambda *x: jnp.concatenate(x), *layouts)


def test_splash_names_rows_that_are_too_long():
    index = jax.ShapeDtypeStruct((1, 2 * LONGEST), jnp.int32)
    x = jax.ShapeDtypeStruct((1, 2 * LONGEST, 1, 128), jnp.float32)

    def attend(x, index):
        return attend_splash(x, x, x, half_layout(index, index, CLEAN))

    with pytest.raises(ValueError, match="65536 tokens"):
        jax.eval_shape(attend, x, index)


def no_tokamax(monkeypatch):
    def version(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)


def moved_internals(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.experimental.tpu.splash_attention", None)


def other_internals(monkeypatch):
    monkeypatch.setattr(splash_attention_mask_info, "MaskInfo", dataclasses.make_dataclass("M", []))


@pytest.mark.parametrize(
    "change, message",
    [
        (no_tokamax, "needs tokamax"),
        (moved_internals, "internals of tokamax 0.0.17, which"),
        (other_internals, "internals of tokamax 0.0.17, which"),
    ],
)
def test_missing_tokamax_says_what_to_install(monkeypatch, change, message):
    change(monkeypatch)
    layout = rows_of([5], 1, BOTH)
    q = k = v = jnp.zeros((1, 128, 1, 128))
    with pytest.raises(ImportError, match=rf"{message}.*llada2-jax\[splash\]"):
        attend_splash(q, k, v, layout)


# --- auto


BOTH = ((NOISY, 64), (CLEAN, 64))
Q = jax.ShapeDtypeStruct((2, 128, 4, 16), jnp.float32)
K = jax.ShapeDtypeStruct((2, 128, 2, 16), jnp.float32)
LAYOUT = rows_of([], 2, BOTH)


def exact(q, k, v, layout, *, backend):
    return attend_reference(q, k, v, layout, layout)


def wrong_in_the_gradient(q, k, v, layout, *, backend):
    out = exact(q, k, v, layout, backend=backend)
    return out if backend != "tpu" else 2.0 * out - jax.lax.stop_gradient(out)


def refuses(q, k, v, layout, *, backend):
    if backend != "splash":
        raise NotImplementedError("no such core")
    return exact(q, k, v, layout, backend=backend)


def blind_to_documents(q, k, v, layout, *, backend):
    layout = type(layout)(layout.block, jnp.minimum(layout.segment, 1), layout.spans)
    return attend_reference(q, k, v, layout, layout)


def forgets_padding(q, k, v, layout, *, backend):
    out = exact(q, k, v, layout, backend=backend)
    return jnp.where((layout.segment > 0)[..., None, None], out, jnp.nan)


@pytest.fixture(autouse=True)
def _nothing_chosen(monkeypatch):
    monkeypatch.setattr(selection, "_chosen", {})
    selection._warn_once.cache_clear()


@pytest.fixture
def on_tpu(monkeypatch):
    """The kernels of a TPU are candidates on the device at hand."""
    monkeypatch.setitem(PREFERENCES, DEVICE.platform, PREFERENCES["tpu"])


@pytest.mark.parametrize(
    "attend, chosen, complaint",
    [
        (exact, "tpu", None),
        (wrong_in_the_gradient, "splash", "dq is off by"),
        (refuses, "splash", "NotImplementedError: no such core"),
        (blind_to_documents, "xla", "output is off by"),
        (forgets_padding, "xla", "output is off by nan"),
    ],
)
def test_auto_takes_the_first_kernel_that_proves_itself(on_tpu, caplog, attend, chosen, complaint):
    """And says, as warnings, which commands show, why not the others, and what it took."""
    for _ in range(2):
        assert select(attend, Q, K, LAYOUT) == chosen
    *refused, choice = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(refused) == {"tpu": 0, "splash": 1, "xla": 2}[chosen]
    for kernel, message in zip(PREFERENCES["tpu"], refused, strict=False):
        assert repr(kernel) in message and DEVICE.device_kind in message and complaint in message
    assert repr(chosen) in choice and DEVICE.device_kind in choice


def test_a_gpu_without_mosaic_takes_triton(monkeypatch, caplog):
    def attend(q, k, v, layout, *, backend):
        if backend == "mosaic":
            raise RuntimeError("ptxas died")
        assert backend == "triton"
        return exact(q, k, v, layout, backend=backend)

    monkeypatch.setitem(PREFERENCES, DEVICE.platform, PREFERENCES["gpu"])
    assert select(attend, Q, K, LAYOUT) == "triton"
    assert "'mosaic' is not used" in caplog.text and "RuntimeError: ptxas died" in caplog.text


def test_auto_can_be_asked_under_a_trace(on_tpu):
    seen = []
    jax.eval_shape(lambda q, k: seen.append(select(exact, q, k, LAYOUT)) or q, Q, K)
    assert seen == ["tpu"]


def forgets_far_keys(q, k, v, layout, *, backend):
    """One window of 128 keys, which queries see whole, far behind them."""
    hidden = jnp.where(jnp.arange(k.shape[1]) // 128 == 6, 0, layout.segment)
    keys = type(layout)(layout.block, hidden, layout.spans)
    return attend_reference(q, k, v, layout, keys)


def fails_on_long_rows(q, k, v, layout, *, backend):
    if q.shape[1] > 512:
        raise RuntimeError("out of vmem")
    return exact(q, k, v, layout, backend=backend)


@pytest.mark.parametrize("attend", [forgets_far_keys, fails_on_long_rows])
def test_what_runs_is_what_is_proven(on_tpu, attend):
    """A fault that short rows do not show."""
    assert select(attend, Q, K, LAYOUT) == "tpu"
    spans = ((NOISY, 640), (CLEAN, 640))
    long_q, long_k = (jax.ShapeDtypeStruct((1, 1280, n, 16), jnp.float32) for n in (4, 2))
    assert select(attend, long_q, long_k, rows_of([], 1, spans)) == "xla"


def forgets_a_window_from_afar(q, k, v, layout, *, backend):
    """As a step without a mask would that is never taken."""
    window = jnp.arange(k.shape[1]) // 128
    keys = type(layout)(layout.block, jnp.where(window == 3, 0, layout.segment), layout.spans)
    far = (abs(window - 3) > 2)[:, None, None]
    near = exact(q, k, v, layout, backend=backend)
    return jnp.where(far, attend_reference(q, k, v, layout, keys), near)


def test_the_proof_of_a_noisy_half_alone_reaches_far_keys(on_tpu):
    q, k = (jax.ShapeDtypeStruct((1, 512, n, 16), jnp.float32) for n in (4, 2))
    layout = rows_of([], 1, ((NOISY, 512),))
    assert select(forgets_a_window_from_afar, q, k, layout) == "xla"


@pytest.mark.parametrize("scores", [1 << 24, 1 << 12])
def test_the_oracle_of_the_check_is_the_oracle(monkeypatch, scores):
    monkeypatch.setattr(checking, "SCORES", scores)
    layout = rows_of([1, 13, 21], 2, BOTH)
    sampled = checking.sampled_queries(Q.shape, K.shape)
    assert len(sampled) == min(128, scores // (2 * 128))
    inputs = checking._inputs(Q.shape, K.shape, Q.dtype, sampled)
    expected = checking._expected(*[tuple(sampled.tolist())] * 2, layout, *inputs)
    actual = output_and_gradients(functools.partial(exact, backend=""))(*inputs, layout)
    output, d_q, *d_keys = actual
    known = output[:, sampled], d_q[:, sampled], *d_keys
    for name, x, y in zip(checking.NAMES, known, expected, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5, err_msg=name)


def test_a_part_of_a_row_is_proven_as_one(on_tpu, caplog):
    """As a device has it whose mesh cuts rows: all keys, some queries; splash cannot."""

    def attend(q, k, v, layout, queries, at, *, backend):
        if backend == "tpu":
            at = at + 1  # the wrong tokens
            queries = type(queries)(layout.block[:, at], layout.segment[:, at], queries.spans)
        chosen = "splash" if backend == "splash" else "reference"
        return block_attention(q, [(k, v, layout)], queries, at=at, backend=chosen)

    part = jax.ShapeDtypeStruct((2, 32, 4, 16), jnp.float32)
    assert select(attend, part, K, LAYOUT) == "xla"
    assert "'tpu' is not used" in caplog.text and "output is off by" in caplog.text
    assert "'splash' is not used" in caplog.text and "takes whole rows" in caplog.text


def test_the_check_passes_a_right_part_of_a_row():
    attend = functools.partial(api._attend_to_self, backend="xla")
    spans = ((NOISY, 160), (CLEAN, 160))
    shapes = (2, 80, 4, 16), (2, 320, 2, 16)
    assert self_check(attend, DEVICE, *shapes, jnp.dtype(jnp.float32), spans) is None


def test_processes_agree_on_the_worst(on_tpu, monkeypatch, caplog):
    """Where the mesh in context is larger than this process."""
    asked = []

    def of_two_processes(mine):
        asked.append(bool(mine))
        return np.array([mine, len(asked) == 1])  # the other one's first kernel fails

    monkeypatch.setattr(multihost_utils, "process_allgather", of_two_processes)
    assert select(exact, Q, K, LAYOUT) == "tpu" and not asked
    mesh = AbstractMesh((2 * jax.local_device_count(),), ("data",))
    with use_abstract_mesh(mesh):
        assert select(exact, Q, K, LAYOUT) == "splash"
    assert asked == [False, False]
    assert "'tpu' is not used" in caplog.text and "failed on processes [1]" in caplog.text


def test_the_device_is_one_that_runs(monkeypatch):
    assert selection.device_at_hand() == (DEVICE, True)
    last = jax.local_devices()[-1]
    with jax.default_device(last):
        assert selection.device_at_hand() == (last, True)
    described = AbstractDevice(device_kind="TPU v6 lite", num_cores=1, platform="tpu")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=described)):
        assert selection.device_at_hand() == (described, False)
        # As it would be there: compiling for a TPU on a CPU machine takes the TPU's kernel.
        assert select(exact, Q, K, LAYOUT) == "tpu"
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
    with use_abstract_mesh(mesh.abstract_mesh):
        assert selection.device_at_hand() == (DEVICE, True)


def test_auto_is_the_default_and_xla_on_cpu(caplog):
    caplog.set_level(logging.INFO, logger=selection.__name__)
    layout = rows_of([1, 13, 21], 2, BOTH)
    q, k, v, _ = checking._inputs(Q.shape, K.shape, Q.dtype, np.arange(128))
    auto = block_attention(q, [(k, v, layout)], layout)
    xla = block_attention(q, [(k, v, layout)], layout, backend="xla")
    np.testing.assert_array_equal(auto, xla)
    assert select(api._attend_to_self, q, k, layout) == "xla"
    (record,) = caplog.records
    assert record.levelno == logging.INFO and "'xla' on cpu" in record.getMessage()


def test_the_check_passes_what_is_right_on_this_device():
    def xla(q, k, v, layout):
        return block_attention(q, [(k, v, layout)], layout, backend="xla")

    spans = ((NOISY, 320), (CLEAN, 320))
    shapes = (2, 640, 4, 16), (2, 640, 2, 16)
    assert self_check(xla, DEVICE, *shapes, jnp.dtype(jnp.bfloat16), spans) is None


@pytest.mark.parametrize("backend", ["tpu", "gpu", "mosaic", "triton", "splash"])
def test_a_kernel_takes_no_other_keys_in_silence(backend):
    cache = half_layout(jnp.zeros((1, 8), jnp.int32), jnp.ones((1, 8), jnp.int32), CLEAN)
    own = half_layout(jnp.ones((1, 8), jnp.int32), jnp.ones((1, 8), jnp.int32), NOISY)
    x = jnp.ones((1, 8, 2, 16))
    for parts in ([(x, x, cache), (x, x, own)], [(x, x, cache)]):
        with pytest.raises(ValueError, match=f"{backend!r} takes one part.*{len(parts)} parts"):
            block_attention(x, parts, own, backend=backend)
        assert block_attention(x, parts, own).shape == x.shape


def test_the_oracle_is_for_toys():
    index = jnp.zeros((1, 4096), jnp.int32)
    layout = half_layout(index, index + 1, CLEAN)
    x = jnp.zeros((1, 4096, 1, 8))
    with pytest.raises(ValueError, match="4096 keys"):
        block_attention(x, [(x, x, layout)], layout, backend="reference")
    half = half_layout(index[:, :2048], index[:, :2048] + 1, CLEAN)
    parts = [(x[:, :2048], x[:, :2048], half)] * 2
    with pytest.raises(ValueError, match="4096 keys"):
        block_attention(x, parts, concatenate([half, half]), backend="reference")


def test_config_and_api_offer_the_same_backends():
    from llada2_jax.config import RuntimeConfig
    from llada2_jax.config_check import CHOICES

    assert CHOICES["runtime.attention_backend"] == BACKENDS
    assert RuntimeConfig().attention_backend == "auto"
