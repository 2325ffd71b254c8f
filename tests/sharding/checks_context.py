"""Rows cut over devices: exact, and in equal shares."""

import dataclasses

import pytest

from llada2_jax.config import ConfigError, DataConfig
from llada2_jax.sharding import check_mesh
from tests.sharding.helpers import CFG, MODEL, assert_equal, gradients, mesh_of


def test_gradients():
    mesh = mesh_of(fsdp=2, context=2, model=2)
    assert_equal(gradients(mesh, "mdlm"), gradients(mesh_of(), "mdlm"))


def test_rows_that_do_not_divide():
    cfg = dataclasses.replace(CFG, data=DataConfig(row_length=20, rows_per_step=8))
    with pytest.raises(ConfigError, match=r"row_length=20 does not divide into 16 pieces"):
        check_mesh(cfg, MODEL, mesh_of(context=8))
