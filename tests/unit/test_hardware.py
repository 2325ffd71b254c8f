import math

import pytest

from llada2_jax.errors import UsageError
from llada2_jax.hardware import CHIPS, GIB, slice_named, slices_of


@pytest.mark.parametrize(
    ("name", "chip", "chips", "devices", "libtpu"),
    [
        ("v5litepod-16", "v5e", 16, 16, "v5e:4x4"),
        ("v5e-16", "v5e", 16, 16, "v5e:4x4"),
        ("V6E-64", "v6e", 64, 64, "v6e:8x8"),
        ("v5p-32", "v5p", 16, 16, "v5p:2x2x4"),  # 32 TensorCores, 2 a chip
        ("tpu7x-2", "tpu7x", 1, 2, "tpu7x:1x1x1"),
        ("tpu7x-16", "tpu7x", 8, 16, "tpu7x:2x2x2"),
    ],
)
def test_names_of_tpu_slices(name, chip, chips, devices, libtpu):
    found = slice_named(name)
    assert (found.chip.name, found.chips, found.devices) == (chip, chips, devices)
    assert found.libtpu_name == libtpu


@pytest.mark.parametrize(("name", "chips"), [("h100-80gb-1", 1), ("h200-141gb-4", 4),
                                             ("h100-80gb-24", 24)])  # fmt: skip
def test_names_of_gpus(name, chips):
    found = slice_named(name)
    assert found.chips == found.devices == chips
    with pytest.raises(ValueError, match="no TPU slice"):
        assert found.libtpu_name


@pytest.mark.parametrize(
    ("name", "what_exists"),
    [
        ("v3-8", r"no chip 'v3'.*v5litepod-N.*v5p-N.*h100-80gb-N"),
        ("v5p", r"no chip 'v5p'.*v5p-N"),
        ("v5p-4", r"counts TensorCores, 2 a chip; 4 chips are v5p-8\..*v5p-8 \(2x2x1\), v5p-16"),
        ("v6e-12", r"counts chips\. There are v6e-1 \(1x1\), v6e-4 \(2x2\), v6e-8"),
        ("v5e-x", r"v5e-256 \(16x16\)"),
        ("h100-80gb-12", r"1, 2, 4 or a multiple of 8"),
        ("h100-80gb-0", r"multiple of 8"),
    ],
)
def test_a_slice_that_does_not_exist_is_told_what_does(name, what_exists):
    with pytest.raises(UsageError, match=what_exists):
        slice_named(name)


@pytest.mark.parametrize("chip", CHIPS.values(), ids=lambda chip: chip.name)
def test_every_slice_has_the_name_it_is_found_by(chip):
    found = slices_of(chip)
    assert [s.chips for s in found] == sorted({s.chips for s in found})
    for s in found:
        assert slice_named(s.name) == s
        assert chip.kind == "gpu" or math.prod(s.topology) == s.chips
    # A program has nearly all of a chip's memory, and never more by much.
    assert 0.89 < chip.usable_bytes * chip.devices / chip.hbm_bytes < 1.01
    assert chip.source.startswith("https://") and chip.hbm_bytes > 15 * GIB
