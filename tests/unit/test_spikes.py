"""Spikes are told from noise, on the device, and what they call for is done to the state."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llada2_jax.config import EVENTS, SpikeConfig, TrainConfig
from llada2_jax.spikes import fresh_watch, judge
from llada2_jax.train_step import begin_phase, init_state, roll_back
from tests.helpers import TINY, random_params

SKIP = SpikeConfig("skip", "skip", "skip", deviations=6.0, window=20)


def watch_of(cfg, losses, norms=None):
    """The watch after these steps, and (applied, names of the events) of each."""
    watch, seen = fresh_watch(), []
    for loss, norm in zip(losses, norms or [1.0] * len(losses), strict=True):
        watch, applied, events = judge(cfg, watch, jnp.float32(loss), jnp.float32(norm))
        names = [name for name, event in zip(EVENTS, events, strict=True) if event]
        seen.append((bool(applied), names))
    return watch, seen


def noise(steps: int, seed: int = 0) -> list[float]:
    return list(5 + 0.1 * np.random.default_rng(seed).standard_normal(steps))


def test_noise_is_no_spike_and_a_spike_is():
    _, seen = watch_of(SKIP, [*noise(200), 7.0, *noise(50)])
    assert [i for i, (_, names) in enumerate(seen) if names] == [200]
    assert seen[200] == (False, ["loss"])


def test_a_spike_of_the_gradient():
    _, seen = watch_of(SKIP, [5.0] * 101, [*noise(100), 50.0])
    assert seen[-1] == (False, ["grad_norm"])


def test_the_moving_average_is_one_of_the_steps_that_were_applied():
    losses = noise(60)
    watch, _ = watch_of(SKIP, [*losses, 90.0, float("nan")])
    decay, mean, square = 1 - 1 / 20, 0.0, 0.0
    for loss in losses:
        mean = decay * mean + (1 - decay) * loss
        square = decay * square + (1 - decay) * loss**2
    np.testing.assert_allclose(watch.mean[0], mean, rtol=1e-5)
    np.testing.assert_allclose(watch.square[0], square, rtol=1e-5)
    assert int(watch.count) == 60


def test_nothing_is_judged_before_the_window_is_full():
    _, seen = watch_of(SKIP, [5.0, 5.1, 500.0, *noise(17), 500.0])
    assert not any(names for _, names in seen)  # the early one has widened what is normal


@pytest.mark.parametrize("policy", ["skip", "rollback", "stop"])
def test_what_is_not_ignored_is_not_applied(policy):
    cfg = SpikeConfig("skip", policy, "ignore", window=20)
    steps = [*noise(60), 90.0, float("inf")]
    _, seen = watch_of(cfg, steps, [*noise(60), 90.0, 1.0])
    assert seen[-2] == (False, ["loss", "grad_norm"]) and seen[-1] == (False, ["non_finite"])


def test_ignored_spikes_are_reported_and_applied():
    cfg = SpikeConfig("skip", "ignore", "ignore", window=20)
    _, seen = watch_of(cfg, [*noise(60), 90.0])
    assert seen[-1] == (True, ["loss"])


def test_a_new_phase_and_a_rollback_need_no_other_program():
    """jax compiles anew for arguments of another type, which where they lie is a part of."""
    cfg = TrainConfig().of_step
    state = init_state(cfg, random_params(TINY, 0))
    reset = dataclasses.replace(cfg.optimizer, reset_each_phase=True)
    for later in (
        begin_phase(cfg, state),
        begin_phase(dataclasses.replace(cfg, optimizer=reset), state),
        roll_back(state, state),
    ):
        assert jax.tree.map(jax.typeof, later) == jax.tree.map(jax.typeof, state)


def test_what_the_host_does_about_an_event_needs_no_other_program():
    policies = [SpikeConfig(loss=policy).of_step for policy in ("ignore", "skip", "rollback")]
    assert policies[0] != policies[1] == policies[2]
