"""The benchmark runs both ways and divides the right way round; its times are nobody's promise."""

import pytest

from llada2_jax.bench import Overhead, loop_overhead
from llada2_jax.config import ConfigError, TrainConfig


def test_shares_are_of_the_loop():
    overhead = Overhead(loop=(2.0, 4.0, 1.0), step=(1.5, 3.9, 1.1))
    assert overhead.shares_outside == pytest.approx([-0.1, 0.025, 0.25])
    summary = overhead.summary()
    assert summary["share_outside_model"] == pytest.approx(0.025)
    assert (summary["loop_seconds"], summary["step_seconds"]) == (2.0, 1.5)


@pytest.mark.parametrize("counts", [{"steps": 0, "rounds": 1}, {"steps": 1, "rounds": 0}])
def test_nothing_to_time_is_an_error(counts):
    with pytest.raises(ConfigError, match="both must be at least 1"):
        loop_overhead(TrainConfig(), **counts)
