"""The commands `hybridattn kernels ..`. Nothing heavy is imported before a command needs it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

kernels = typer.Typer(help="Test, time and compile the kernels.")

Device = Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Default: a GPU if there is one.")]


def chosen_device(wanted: str | None) -> str:
    """The device asked for, by default a GPU if there is one.

    Raises:
        ValueError: "cuda" without a GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' without a GPU, got 'cuda'")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def integers(name: str, wanted: str) -> list[int]:
    """Positive integers with commas between them; option ``name`` in the ValueError for anything else."""
    parts = wanted.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}: expected positive integers with commas between them, got {wanted!r}")
    return [int(part) for part in parts]


@kernels.command()
def bench(
    tokens: Annotated[str | None, typer.Option(help="Lengths of sequences and caches, such as 1024,4096.")] = None,
    samples: Annotated[int, typer.Option(help="Rounds, in which every implementation is timed once.")] = 15,
    device: Device = None,
    peers: Annotated[bool, typer.Option(help="Also time PyTorch's and flash-linear-attention's operators.")] = False,
    out: Annotated[Path, typer.Option(help="JSON lines; a run goes on there.")] = Path("reports/bench.jsonl"),
    plot: Annotated[Path | None, typer.Option(help="Draw a roofline into this file, such as roofline.png.")] = None,
) -> None:
    """Time the operators against this machine's copy and matrix product, and beside other implementations."""
    from hybridattn.workshop.bench import run_benchmark

    lengths = integers("tokens", tokens) if tokens else []
    run_benchmark(chosen_device(device), peers, samples, lengths, out, plot)


@kernels.command()
def check(
    device: Device = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Operator; may be repeated.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="torch or triton; may be repeated.")] = None,
    out: Annotated[Path, typer.Option(help="JSON lines; cases that are there are not run again.")] = Path(
        "reports/check.jsonl"
    ),
    record: Annotated[bool, typer.Option(help="Mark launch rows that passed as verified on this GPU.")] = False,
) -> None:
    """Compare every operator and launch row with the fp64 reference on this machine."""
    from hybridattn.workshop.check import check_operators

    if not check_operators(chosen_device(device), out, kernel or (), backend or (), record):
        raise typer.Exit(1)


@kernels.command()
def tune(
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel; may be repeated.")] = None,
    dim: Annotated[list[int] | None, typer.Option(help="Of the launch table's rows; may be repeated.")] = None,
    samples: Annotated[int, typer.Option(help="Timed calls per row.")] = 15,
    out: Annotated[Path, typer.Option(help="JSON lines.")] = Path("reports/tune.jsonl"),
) -> None:
    """Search for faster launch rows on this machine's GPU, and print them; the launch table stays as it is."""
    from hybridattn.workshop.tune import search_launches

    search_launches(chosen_device(None), kernel or [], dim or [], samples, out)


@kernels.command()
def compile(
    arch: Annotated[list[str] | None, typer.Option(help="Architecture, such as sm_90; may be repeated.")] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel; may be repeated.")] = None,
    record: Annotated[
        bool, typer.Option(help="Lower the ceilings to these figures, and set those of new rows.")
    ] = False,
    may_rise: Annotated[bool, typer.Option(help="With --record, raise ceilings too.")] = False,
) -> None:
    """Compile every launch row for every architecture, without a GPU, and compare it with its recorded ceilings."""
    from hybridattn.workshop.compile import check_compilation

    if not check_compilation(arch or (), kernel or (), record=record, may_rise=may_rise):
        raise typer.Exit(1)
