"""Rows cut over devices: exact, and in equal shares."""

import dataclasses

import pytest

from llada2_jax.config import ConfigError, DataConfig
from llada2_jax.sharding import check_mesh
from tests.sharding.helpers import CFG, MODEL, assert_equal, gradients, mesh_of


@pytest.mark.parametrize(
    "objective, sizes",
    [("ar", {"context": 8}), ("bdlm", {"fsdp": 2, "context": 2, "model": 2})],
)
def test_gradients(objective, sizes):
    assert_equal(gradients(mesh_of(**sizes), objective), gradients(mesh_of(), objective))


def test_rows_that_do_not_divide():
    cfg = dataclasses.replace(CFG, data=DataConfig(row_length=20, rows_per_step=8))
    with pytest.raises(ConfigError, match=r"row_length=20 does not divide into 16 pieces"):
        check_mesh(cfg, MODEL, mesh_of(context=8))
