"""Rows cut over devices: exact, and in equal shares."""

import dataclasses

import pytest

from llada2_jax.config import ConfigError, DataConfig
from llada2_jax.sharding import check_mesh
from tests.sharding.helpers import CFG, MODEL, SHALLOW, assert_equal, gradients, mesh_of


@pytest.mark.parametrize(
    "objective, sizes, model",
    [("mdlm", {"fsdp": 2, "model": 2}, MODEL), ("bdlm", {"fsdp": 2, "expert": 2}, SHALLOW)],
    ids=["tensor", "experts"],
)
def test_gradients(objective, sizes, model):
    """Both halves of a row and experts: as flash is trained at 32k."""
    mesh = mesh_of(context=2, **sizes)
    assert_equal(*(gradients(on, objective, model=model) for on in (mesh, mesh_of())))


def test_rows_that_do_not_divide():
    cfg = dataclasses.replace(CFG, data=DataConfig(row_length=20, rows_per_step=8))
    with pytest.raises(ConfigError, match=r"row_length=20 does not divide into 16 pieces"):
        check_mesh(cfg, MODEL, mesh_of(context=8))
