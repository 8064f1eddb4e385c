"""The commands ``hybridattn kernels bench``, ``check``, ``tune`` and ``compile``.

A command imports torch and triton only when it runs, so that ``--help`` is fast.
"""

from pathlib import Path
from typing import Annotated, Literal

import typer

kernels = typer.Typer(help="Test, time and compile the kernels.")

Device = Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Default: a GPU if there is one.")]


def chosen_device(wanted: str | None) -> str:
    """Return the requested device; by default "cuda" if there is a GPU, else "cpu".

    Raises:
        ValueError: "cuda" was requested and there is no GPU.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: expected 'cpu' without a GPU, got 'cuda'")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def integers(name: str, wanted: str) -> list[int]:
    """Parse positive integers separated by commas.

    Raises:
        ValueError: the text is anything else; the message names the option ``name``.
    """
    parts = wanted.split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"{name}: expected positive integers separated by commas, got {wanted!r}")
    return [int(part) for part in parts]


@kernels.command()
def bench(
    tokens: Annotated[
        str | None, typer.Option(help="Lengths of sequences and caches in tokens, such as 1024,4096.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Number of rounds; each round times every implementation once.")] = 15,
    device: Device = None,
    peers: Annotated[bool, typer.Option(help="Also time PyTorch's and flash-linear-attention's operators.")] = False,
    out: Annotated[Path, typer.Option(help="Results, JSON lines; results in it are not measured again.")] = Path(
        "reports/bench.jsonl"
    ),
    plot: Annotated[Path | None, typer.Option(help="Write a roofline plot to this file, such as roofline.png.")] = None,
) -> None:
    """Time the operators; compare with the machine's copy and matrix-product rates and with other implementations."""
    from hybridattn.workshop.bench import run_benchmark

    lengths = integers("tokens", tokens) if tokens else []
    run_benchmark(chosen_device(device), peers, samples, lengths, out, plot)


@kernels.command()
def check(
    device: Device = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Operator to check; may be repeated. Default: all.")] = None,
    backend: Annotated[
        list[str] | None, typer.Option(help="torch or triton; may be repeated. Default: all that run here.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Results, JSON lines; cases in it are not run again.")] = Path(
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
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel to tune; may be repeated. Default: all.")] = None,
    dim: Annotated[
        list[int] | None, typer.Option(help="Key of the launch table's rows; may be repeated. Default: all.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Timed calls per row.")] = 15,
    out: Annotated[Path, typer.Option(help="Results, JSON lines.")] = Path("reports/tune.jsonl"),
) -> None:
    """Search for faster launch parameters on this machine's GPU and print them; the launch tables do not change."""
    from hybridattn.workshop.tune import search_launches

    search_launches(chosen_device(None), kernel or [], dim or [], samples, out)


@kernels.command()
def compile(
    arch: Annotated[
        list[str] | None, typer.Option(help="Architecture, such as sm_90; may be repeated. Default: all.")
    ] = None,
    kernel: Annotated[list[str] | None, typer.Option(help="Kernel to compile; may be repeated. Default: all.")] = None,
    record: Annotated[
        bool, typer.Option(help="Lower the recorded ceilings to these figures, and add those of new rows.")
    ] = False,
    may_rise: Annotated[bool, typer.Option(help="With --record, also raise ceilings.")] = False,
) -> None:
    """Compile every launch row for every architecture, without a GPU, and compare with the recorded ceilings.

    Ceilings are the most registers, spills and bytes of shared memory that a row may use.
    """
    from hybridattn.workshop.compile import check_compilation

    if not check_compilation(arch or (), kernel or (), record=record, may_rise=may_rise):
        raise typer.Exit(1)
