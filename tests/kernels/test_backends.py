"""Choosing a backend, and tokamax's splash attention under the contract."""

import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.block_attention import BACKENDS, api, attend_reference, block_attention
from pallas_kernels.block_attention.selection import PREFERENCES, sample, select, self_check
from pallas_kernels.block_attention.splash import LONGEST, attend_splash, computed_pairs
from pallas_kernels.block_layout import CLEAN, concatenate, half_layout, key_intervals
from pallas_kernels.shapes import packed_layout
from tests.kernels.contract import AttentionContract, Case

DEVICE = jax.local_devices()[0]


class TestSplash(AttentionContract):
    """The whole contract, with each value of a factor in one case at least: compiling splash in
    interpret mode takes seconds for each."""

    cases = (
        Case("tiny", "both", "float32", 32, "straddling", "document", 21),
        Case("tiny", "noisy", "float32", "row", "many_tiny", "row", 0),
        Case("mini", "clean", "bfloat16", 1, "aligned", "document", 21),
        Case("flash", "both", "bfloat16", 4, "one_token", "row", 0),
        Case("mini", "both", "float32", 64, "none", "document", 0),
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


def test_missing_tokamax_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax._src.ops.experimental.tpu.splash_attention", None)
    layout, (_, q, k, v) = sample(1, 128, "float32")
    with pytest.raises(ImportError, match=r"llada2-jax\[splash\]"):
        attend_splash(q, k, v, layout)


# --- auto


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


Q = jax.ShapeDtypeStruct((1, 8, 4, 16), jnp.float32)
K = jax.ShapeDtypeStruct((1, 8, 2, 16), jnp.float32)


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
    with caplog.at_level(logging.INFO):
        assert select(attend, Q, K) == chosen
        assert select(attend, Q, K) == chosen
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == {"tpu": 0, "splash": 1, "xla": 2}[chosen]
    assert all(complaint in w and DEVICE.device_kind in w for w in warnings)
    decisions = [r.getMessage() for r in caplog.records if r.levelno == logging.INFO]
    assert len(decisions) == 1 and repr(chosen) in decisions[0], "decided once, and said so"


def test_auto_can_be_asked_under_a_trace(on_tpu):
    seen = []

    def under_trace(q, k, v, layout, *, backend):
        return exact(q, k, v, layout, backend=backend)

    jax.eval_shape(lambda q, k: seen.append(select(under_trace, q, k)) or q, Q, K)
    assert seen == ["tpu"]


def test_auto_is_the_default_and_xla_on_cpu():
    layout, (_, q, k, v) = sample(2, 16, "float32")
    auto = block_attention(q, [(k, v, layout)], layout)
    xla = block_attention(q, [(k, v, layout)], layout, backend="xla")
    np.testing.assert_array_equal(auto, xla)
    assert select(api._attend_to_self, q, k) == "xla"


def test_the_check_passes_what_is_right_on_this_device():
    def xla(q, k, v, layout):
        return block_attention(q, [(k, v, layout)], layout, backend="xla")

    assert self_check(xla, DEVICE, 2, 16, jnp.bfloat16) is None


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
    from llada2_jax.config import CHOICES, RuntimeConfig

    assert CHOICES["runtime.attention_backend"] == BACKENDS
    assert RuntimeConfig().attention_backend == "auto"
