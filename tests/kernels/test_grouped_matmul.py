"""Products of sorted rows with a matrix a group: every backend, and which one "auto" is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tokamax
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh
from tokamax._src import gpu_utils

from pallas_kernels import selection
from pallas_kernels.grouped_matmul import api, chosen_backend, grouped_matmul, row_alignment

ROWS, GROUPS, D, F = 96, 5, 16, 24
SIZES = np.array([32, 0, 8, 24, 16])  # and 16 rows of no group
SHAPE = (GROUPS, D, F)


def described(kind: str, platform: str):
    device = AbstractDevice(device_kind=kind, num_cores=None, platform=platform)
    return use_abstract_mesh(AbstractMesh((), (), abstract_device=device))


@pytest.mark.parametrize("backend", api.BACKENDS[1:])
def test_is_a_product_with_each_row_s_matrix(backend):
    rng = np.random.default_rng(0)
    x, w, cotangent = (
        rng.standard_normal(s).astype(np.float32) for s in ((ROWS, D), SHAPE, (ROWS, F))
    )
    group, used = np.repeat(np.arange(GROUPS), SIZES), int(SIZES.sum())
    alignment = row_alignment(ROWS, GROUPS, backend)
    assert not (SIZES % alignment).any()

    @jax.jit
    def run(x, w, sizes, cotangent):
        def product(x, w):
            return grouped_matmul(x, w, sizes, alignment=alignment, backend=backend)

        out, pull = jax.vjp(product, x, w)
        return out, *pull(cotangent)

    cotangent[used:] = 0  # nobody asks for rows of no group
    out, d_x, d_w = run(x, w, jnp.asarray(SIZES, jnp.int32), cotangent)
    assert np.isfinite(out).all()
    np.testing.assert_allclose(
        out[:used], np.einsum("md,mdf->mf", x[:used], w[group]), rtol=1e-4, atol=1e-5
    )
    expected = np.einsum("mf,mdf->md", cotangent[:used], w[group])
    np.testing.assert_allclose(d_x[:used], expected, rtol=1e-4, atol=1e-5)
    for g in range(GROUPS):
        of_g = np.flatnonzero(group == g)
        np.testing.assert_allclose(d_w[g], x[of_g].T @ cotangent[of_g], rtol=1e-4, atol=1e-5)


def unwritten(x, w, sizes, implementation):
    """A kernel that writes no row past the groups, of the output or of x's gradient."""

    def blank(rows, sizes):
        past = jnp.arange(len(rows), dtype=jnp.int32)[:, None] >= sizes.sum()
        return jnp.where(past, jnp.nan, rows)

    def forward(x, w, sizes):
        out, pull = jax.vjp(lambda x, w: jax.lax.ragged_dot(x, w, sizes), x, w)
        return blank(out, sizes), (pull, sizes)

    def backward(kept, cotangent):
        pull, sizes = kept
        d_x, d_w = pull(cotangent)
        return blank(d_x, sizes), d_w, None

    product = jax.custom_vjp(lambda *inputs: forward(*inputs)[0])
    product.defvjp(forward, backward)
    return product(x, w, sizes)


def test_what_a_kernel_does_not_write_goes_nowhere(monkeypatch):
    monkeypatch.setattr(tokamax, "ragged_dot", unwritten)
    sizes = jnp.asarray(SIZES, jnp.int32)

    def product(x, w):
        return grouped_matmul(x, w, sizes, alignment=1, backend="tokamax")

    out, pull = jax.vjp(product, jnp.ones((ROWS, D)), jnp.ones(SHAPE))
    used = np.arange(ROWS)[:, None] < SIZES.sum()
    np.testing.assert_array_equal(out, np.where(used, D, 0) * np.ones(F))
    d_x, _ = pull(jnp.ones((ROWS, F)))
    np.testing.assert_array_equal(d_x, np.where(used, F, 0) * np.ones(D))
    assert api._self_check("tokamax", jax.local_devices()[0], shape=SHAPE, dtype="float32") is None


def test_auto_is_what_the_device_is_good_at():
    assert chosen_backend("auto", SHAPE, "bfloat16") == "tiles"
    with described("TPU v6 lite", "tpu"):
        assert chosen_backend("auto", SHAPE, "bfloat16") == "ragged_dot"
    with described("NVIDIA H100 80GB HBM3", "gpu"):
        assert chosen_backend("auto", SHAPE, "bfloat16") == "tokamax"
        assert chosen_backend("tiles", SHAPE, "bfloat16") == "tiles"
    with pytest.raises(ValueError, match="'megablox'"):
        chosen_backend("megablox", SHAPE, "bfloat16")


@pytest.mark.parametrize("fault", [None, "raises", "wrong", "gradient"])
def test_auto_takes_a_kernel_that_proves_itself(monkeypatch, caplog, fault):
    """As on a GPU at hand."""

    def kernel(x, w, group_sizes):
        if fault == "raises":
            raise NotImplementedError("no such chip")
        if fault == "gradient":
            w = jax.lax.stop_gradient(w)
        out = jax.lax.ragged_dot(x, w, group_sizes)
        return out.at[300].add(1.0) if fault == "wrong" else out

    monkeypatch.setitem(api.PREFERENCES, jax.default_backend(), ("tokamax",))
    monkeypatch.setattr(selection, "_chosen", {})
    monkeypatch.setattr(api, "_tokamax", kernel)
    chosen = chosen_backend("auto", SHAPE, "float32")
    assert chosen == ("tiles" if fault else "tokamax")
    assert ("'tokamax' is not used" in caplog.text) == (fault is not None)


def test_lowers_for_hopper(monkeypatch):
    """Forward and both gradients of mini's experts, as kernels: as far as can be seen here."""
    monkeypatch.setattr(gpu_utils, "is_sm90", lambda device=None: True)
    shapes = [((8192, 2048), "bfloat16"), ((256, 2048, 1024), "bfloat16"), ((256,), "int32")]
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]

    def loss(x, w, sizes):
        out = grouped_matmul(x, w, sizes, alignment=1, backend="tokamax")
        return (out.astype(jnp.float32) ** 2).sum()

    standard = jax.numpy_dtype_promotion("standard")  # which tokamax's kernels are written in
    with described("NVIDIA H100 80GB HBM3", "gpu"), tokamax.config.cross_compile(True), standard:
        traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(*arguments)
        text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("custom_call @mosaic_gpu") == 3
