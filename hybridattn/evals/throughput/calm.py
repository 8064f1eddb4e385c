"""Whether a CPU was undisturbed while something was timed.

On a shared machine, and most virtual ones are, a neighbour on the same core makes everything up to twice as slow, for
fractions of a second at a time, and a median of such times says more of the neighbour than of the model. So a fixed
piece of work is timed before and after every sample: where it took longer than it can, the sample is set aside. That
does not look at the sample itself, so it cannot prefer one model's slow calls to another's.
"""

import time

import torch

TOLERANCE = 1.05  # times the floor that an undisturbed machine takes
WARMUP = 200


class Probe:
    """A product of matrices that fit into a core's own cache, a quarter of a millisecond of work.

    ``floor`` is the least time it ever took here, in seconds.
    """

    def __init__(self) -> None:
        self._factor = torch.randn(160, 160, generator=torch.Generator().manual_seed(0))
        self.floor = min(self.seconds() for _ in range(WARMUP))

    def seconds(self) -> float:
        """The time that the work takes now, its operands in the cache, whatever was timed before it."""
        _ = self._factor @ self._factor
        start = time.perf_counter()
        for _ in range(3):
            _ = self._factor @ self._factor
        return time.perf_counter() - start

    def disturbance(self) -> float:
        """That time over the least ever."""
        took = self.seconds()
        self.floor = min(self.floor, took)
        return took / self.floor
