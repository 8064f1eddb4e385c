"""Timing of calls in interleaved rounds, on a GPU with CUDA events and, for short calls, CUDA graphs."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from hybridattn.measure.timing import timed

GRAPH_SECONDS = 0.02  # duration of the calls in one CUDA graph

Run = Callable[[], object]


class Timed(NamedTuple):
    """Samples of one call.

    Attributes:
        seconds: seconds of the call in every round.
        in_graph: whether it was replayed from a CUDA graph.
    """

    seconds: list[float]
    in_graph: bool


def interleaved(calls: dict[str, Run], device: torch.device, rounds: int, *, replay: bool = False) -> dict[str, Timed]:
    """Time calls in rounds, each call once per round, after two warm-up calls.

    Args:
        calls: functions to be timed, by name.
        device: the device they run on.
        rounds: number of rounds, that is samples of every call.
        replay: on a GPU, take as sample the mean of many calls in a CUDA graph. Timing single calls of a kernel of a
            few microseconds would measure its launch. A call that cannot be captured is timed as a single call.
    """
    for call in (*calls.values(), *calls.values()):
        call()
    if device.type != "cuda":
        samples = [{name: timed(call) for name, call in calls.items()} for _ in range(rounds)]
        return {name: Timed([each[name] for each in samples], False) for name in calls}
    graphs = {name: _captured(call) if replay else None for name, call in calls.items()}
    runs = {name: graph[0].replay if graph else calls[name] for name, graph in graphs.items()}
    events = [{name: _events_around(run) for name, run in runs.items()} for _ in range(rounds)]
    torch.cuda.synchronize()
    found = {}
    for name, graph in graphs.items():
        together = 1 if graph is None else graph[1]
        found[name] = Timed([_seconds(*each[name]) / together for each in events], graph is not None)
    return found


def _events_around(call: Run) -> tuple[torch.cuda.Event, torch.cuda.Event]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    return start, end


def _seconds(start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    return start.elapsed_time(end) / 1e3


def _captured(call: Run) -> tuple[torch.cuda.CUDAGraph, int] | None:
    """Capture as many calls as take GRAPH_SECONDS in a CUDA graph; None if the call cannot be captured.

    Returns:
        The graph and the number of calls in it.
    """
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.stream(torch.cuda.Stream()):
            events = _events_around(call)
            torch.cuda.synchronize()
            number = max(1, int(GRAPH_SECONDS / max(_seconds(*events), 1e-6)))
            with torch.cuda.graph(graph):
                for _ in range(number):
                    call()
    except RuntimeError:  # for example, the call synchronises; after a CUDA error single calls fail as well
        return None
    return graph, number
