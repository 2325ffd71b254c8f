"""Layers in stages: exact, also where they do not divide among the stages."""

import dataclasses

import pytest

from tests.sharding.helpers import MODEL, assert_equal, gradients, mesh_of

CASES = [
    ("ar", {"stage": 4, "fsdp": 2}, {"num_layers": 6, "remat": "full"}),
    ("bdlm", {"stage": 2, "expert": 2, "model": 2}, {}),
]


@pytest.mark.parametrize("objective, sizes, changes", CASES)
def test_gradients(objective, sizes, changes):
    """5 MoE layers in 4 stages, or 3 in 2: three layers are filled up, or one."""
    model = dataclasses.replace(MODEL, **changes)
    single = gradients(mesh_of(), objective, model=model)
    assert_equal(gradients(mesh_of(**sizes), objective, model=model), single)
