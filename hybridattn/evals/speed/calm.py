"""Whether a CPU was undisturbed while something was timed.

On a shared machine, and most virtual ones are, a neighbour on the same core makes everything up to twice as slow, for
fractions of a second at a time, and a median of such times says more of the neighbour than of the model. So a fixed
piece of work is timed again and again until it takes no longer than it can, then a sample is taken, and if the work
takes longer after it, the sample is set aside (`statistics.undisturbed`). That does not look at the sample itself, so
it cannot prefer one model's slow calls to another's. That memory is slow, for minutes, does not show there: it is
measured before the calls of every figure, and taken out later (`drift`).
"""

import ctypes
import time

import torch

from hybridattn.evals.speed.statistics import TOLERANCE

WARMUP = 200
VALUES = 1 << 24  # floats that are read from: more than the caches hold
READS, SETS = 4000, 10  # how many are timed together, and how often
TRIM_THRESHOLD, MMAP_MAX = -1, -4  # of malloc.h


class Probe:
    """A product of matrices that fit into a core's own cache, a quarter of a millisecond of work; and reads of memory.

    ``floor`` is the least time that the product ever took here, in seconds.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._factor = torch.randn(160, 160, generator=generator)
        self._product = torch.empty_like(self._factor)  # memory that is asked for now may have to be mapped first
        self._values, self._read = torch.ones(VALUES), torch.empty(READS)
        self._places = [torch.randint(VALUES, (READS,), generator=generator) for _ in range(5 * SETS)]
        self._turn = 0
        self.floor = min(self.seconds() for _ in range(WARMUP))

    def seconds(self) -> float:
        """The time that the work takes now, its operands in the cache, whatever was timed before it."""
        torch.mm(self._factor, self._factor, out=self._product)
        start = time.perf_counter()
        for _ in range(3):
            torch.mm(self._factor, self._factor, out=self._product)
        return time.perf_counter() - start

    def is_calm(self, seconds: float) -> bool:
        """Whether that is about the least ever."""
        self.floor = min(self.floor, seconds)
        return seconds <= TOLERANCE * self.floor

    @torch.inference_mode()
    def reads(self) -> list[float]:
        """Seconds that reads at random places of memory take now, ten times: a twentieth of a millisecond, or more.

        Times while somebody else used the core are left out.
        """
        found = []
        for places in self._places[self._turn : self._turn + SETS]:
            before, start = self.seconds(), time.perf_counter()
            torch.index_select(self._values, 0, places, out=self._read)
            taken = time.perf_counter() - start
            found += [taken] if self.is_calm(max(before, self.seconds())) else []
        self._turn = (self._turn + SETS) % len(self._places)
        return found

    def wait(self, patience: float) -> float:
        """Wait until the machine is undisturbed, or for ``patience`` seconds; the seconds of the work at the end."""
        end = time.perf_counter() + patience
        while not self.is_calm(found := self.seconds()) and time.perf_counter() < end:
            pass
        return found


def keep_freed_memory() -> None:
    """Let this process keep what tensors on the CPU free, as PyTorch does on a GPU; nothing where there is no glibc.

    Otherwise every call that needs tens of megabytes has them mapped and zeroed anew, page by page, which takes time,
    and one that varies.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(TRIM_THRESHOLD, -1)  # never
        mallopt(MMAP_MAX, 0)
