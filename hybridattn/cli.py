"""The `hybridattn` command. Nothing heavy is imported before a verb needs it."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

import hybridattn

if TYPE_CHECKING:
    from hybridattn.models.decoder import HybridAttnConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

CONTEXT_LENGTHS = {"2k": 2**11, "32k": 2**15, "1M": 2**20}


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: the process's own) and exit; bad input is one line on stderr and code 2."""
    try:
        code = app(args, prog_name="hybridattn", standalone_mode=False)
    except (typer.TyperException, ValueError) as error:
        print("hybridattn:", " ".join(str(error).split()), file=sys.stderr)
        code = 2
    sys.exit(code)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(hybridattn.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Linear, softmax and hybrid attention for long contexts."""


@app.command()
def demo(
    seeds: Annotated[int, typer.Option(min=1, help="Recall models trained per row.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of the recipe's.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the report.")] = Path("reports/demo"),
    only: Annotated[list[str] | None, typer.Option(help="Run this part alone; may be repeated.")] = None,
) -> None:
    """Train, generate and measure small hybrid models on this machine's CPU."""
    from hybridattn.evals.demo import run

    run(out=out, seeds=seeds, steps=steps, only=only)


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_PRESET", help="A saved model's folder, or a preset.")],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Type of the cache.")] = "bfloat16",
) -> None:
    """Show each layer's mixer, parameters and state per sequence at 2k, 32k and 1M tokens."""
    import torch
    from rich.console import Console
    from rich.table import Table

    from hybridattn.models.decoder import HybridAttnForCausalLM
    from hybridattn.models.decoder.accounting import cache_bytes, cache_spec

    config = _load_config(model)
    cache = {"batch_size": 1, "dtype": getattr(torch, dtype)}
    specs = [cache_spec(config, tokens=tokens, **cache) for tokens in CONTEXT_LENGTHS.values()]
    with torch.device("meta"):
        net = HybridAttnForCausalLM(config)

    table = Table(
        "layer", "mixer", title=f"{model}: parameters, and state per sequence as elements and bytes ({dtype})"
    )
    for heading in ("parameters", *(f"state at {length}" for length in CONTEXT_LENGTHS)):
        table.add_column(heading, justify="right")
    for i, mixer in enumerate(config.mixers):
        parameters = sum(p.numel() for p in net.model.layers[i].parameters())
        layer_states = [[(torch.Size(shape).numel(), t.itemsize) for shape, t in spec[i].values()] for spec in specs]
        states = [_state(sum(n for n, _ in s), sum(n * size for n, size in s)) for s in layer_states]
        table.add_row(str(i), mixer, f"{parameters:,}", *states)
    table.add_section()
    elements = [sum(torch.Size(shape).numel() for layer in spec for shape, _ in layer.values()) for spec in specs]
    sizes = [cache_bytes(config, tokens=tokens, **cache) for tokens in CONTEXT_LENGTHS.values()]
    parameters = sum(p.numel() for p in net.parameters())
    table.add_row("all", "with embeddings", f"{parameters:,}", *map(_state, elements, sizes))
    console = Console()
    console.print(table, width=console.width if console.is_terminal else 120)


def _load_config(model: str) -> "HybridAttnConfig":
    from transformers import AutoConfig

    from hybridattn.models.decoder import HybridAttnConfig
    from hybridattn.models.presets import PRESETS

    if model in PRESETS:
        return HybridAttnConfig(**PRESETS[model])
    if not Path(model, "config.json").is_file():
        raise ValueError(f"expected a folder with config.json or one of the presets {sorted(PRESETS)}, got {model!r}")
    config = AutoConfig.from_pretrained(model)
    if not isinstance(config, HybridAttnConfig):
        raise ValueError(f"expected a hybridattn model, got model_type {config.model_type!r} in {model!r}")
    return config


def _state(elements: int, size: int) -> str:
    return f"{elements:,}  {_bytes(size):>8}"


def _bytes(size: float) -> str:
    """Decimal units with three digits: 5.73 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


@app.command()
def env() -> None:
    """Show the versions and the hardware that a report about a problem should name."""
    import torch

    facts = {
        "hybridattn": hybridattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{package: _version(package) for package in ("torch", "triton", "transformers")},
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for name, value in facts.items():
        print(f"{name:<13}{value}")


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


if __name__ == "__main__":
    main()
