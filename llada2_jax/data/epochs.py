"""What is planned once for an epoch and read by many rows."""

from __future__ import annotations

import threading
from collections.abc import Callable

# The rows in the making lie in two windows of shuffled rows at most, and those in three epochs.
EPOCHS_KEPT = 3


class EpochPlans[T]:
    """The plans of the epochs last asked for. Each source has its own, so that sources that are at
    different epochs do not drive each other's out; it may be asked by several threads."""

    def __init__(self):
        self._plans: dict[int, T] = {}  # the one asked for last stands last
        self._lock = threading.Lock()

    def get(self, epoch: int, plan: Callable[[int], T]) -> T:
        """plan(epoch), made by one thread while the others wait for it."""
        with self._lock:
            if epoch in self._plans:
                self._plans[epoch] = self._plans.pop(epoch)
                return self._plans[epoch]
            while len(self._plans) >= EPOCHS_KEPT:
                del self._plans[next(iter(self._plans))]
            self._plans[epoch] = plan(epoch)
            return self._plans[epoch]
