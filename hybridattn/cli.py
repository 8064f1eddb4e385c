"""The command line `hybridattn <command>`; a command imports its dependencies only when it runs, to start quickly."""

import math
import os
import platform
import sys
from dataclasses import replace
from io import TextIOWrapper
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

import hybridattn
from hybridattn.workshop.cli import chosen_device as _device
from hybridattn.workshop.cli import integers as _integers
from hybridattn.workshop.cli import kernels

if TYPE_CHECKING:
    from hybridattn.evals.pareto.suite import Suite
    from hybridattn.layers.mixer import CacheSpec
    from hybridattn.models.decoder import HybridAttnConfig

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)

app.add_typer(kernels, name="kernels")

CONTEXT_LENGTHS = {"2k": 2**11, "32k": 2**15, "1M": 2**20}


def main(args: list[str] | None = None) -> None:
    """Run the command line `args` (default: the process's own) and exit; bad input prints one line and exits with 2."""
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # shows a measured row at once, also in a pipe
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # otherwise torch's profiler logs every start of a memory profile
    try:
        code = app(args, prog_name="hybridattn", standalone_mode=False)
    except typer.TyperException as error:
        code = _refuse(error.format_message())
    except ValueError as error:
        code = _refuse(str(error))
    sys.exit(code)


def _refuse(reason: str) -> int:
    print("hybridattn:", " ".join(reason.split()), file=sys.stderr)
    return 2


def _print_version(wanted: bool) -> None:
    if wanted:
        print(hybridattn.__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Linear, softmax and hybrid attention for long contexts."""


@app.command()
def demo(
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps, instead of the recipe's.")] = None,
    out: Annotated[
        Path, typer.Option(help="Folder for measurements and report; an interrupted run resumes there.")
    ] = Path("reports/demo"),
    only: Annotated[list[str] | None, typer.Option(help="Part to run, text or recall; may be repeated.")] = None,
) -> None:
    """Train small hybrid models on the CPU, sample text, and measure them, in six minutes on two cores."""
    from hybridattn.evals.demo import run_demo

    _show(out, run_demo(out=out, steps=steps, only=only))


@app.command("eval", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def evaluate(
    context: typer.Context,
    model: Annotated[str, typer.Option("--model", "-M", help="Folder of a checkpoint, or its name on the Hub.")],
    lengths: Annotated[
        str | None, typer.Option("--lengths", help="Lengths of prompt and answer in tokens, such as 1024,4096.")
    ] = None,
    out: Annotated[Path, typer.Option("--output_path", "-o", help="Folder for the report.")] = Path("reports/eval"),
    allow_truncation: Annotated[
        bool, typer.Option("--allow_truncation", help="Truncate prompts longer than the model's maximum input.")
    ] = False,
    trained_length: Annotated[
        int | None,
        typer.Option("--trained_length", help="Training length in tokens: also measure bits per token up to 16x it."),
    ] = None,
) -> None:
    """Score recall with lm-eval, e.g. --tasks recall_offline; accepts all other flags of `lm_eval run`."""
    try:
        from hybridattn.evals.lm_eval.evaluate import evaluate
    except ModuleNotFoundError as error:
        raise ValueError(f"eval: expected lm-eval, got an error: {error}; pip install 'hybridattn[eval]'") from error

    options = {"out": out, "allow_truncation": allow_truncation, "trained_length": trained_length}
    wanted = None if lengths is None else _integers("lengths", lengths)
    if not evaluate(model, context.args, lengths=wanted, **options):
        raise typer.Exit(1)


@app.command()
def throughput(
    model: Annotated[list[str], typer.Option("--model", "-M", help="Folder, Hub name or preset; may be repeated.")],
    lengths: Annotated[str | None, typer.Option(help="Prompt lengths for prefill, in tokens: 1024,4096.")] = None,
    contexts: Annotated[str, typer.Option(help="Context lengths for decoding one sequence, in tokens.")] = "1024,8192",
    batches: Annotated[str | None, typer.Option(help="Batch sizes for decoding, at the first context.")] = None,
    training: Annotated[str | None, typer.Option(help="Row lengths for forward and backward, in tokens.")] = None,
    budget: Annotated[float | None, typer.Option(help="Find the largest batch within this memory, in GB.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"] | None,
        typer.Option(help="Default: bfloat16 on a GPU, float32 on a CPU."),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Threads per operation, on a CPU.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds; every model is timed once in each.")] = 5,
    graphs: Annotated[bool, typer.Option(help="Also time decoding with CUDA graphs.")] = False,
    device: Annotated[Literal["cuda", "cpu"] | None, typer.Option(help="Default: a GPU if there is one.")] = None,
    again: Annotated[bool, typer.Option(help="Repeat timings that are already in the folder.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for measurements and report; an interrupted run resumes there.")
    ] = Path("reports/throughput"),
) -> None:
    """Measure prefill, decoding, training and memory of any Hugging Face model; random weights if none are saved."""
    from hybridattn.evals.pareto.suite import Suite
    from hybridattn.evals.speed import models

    if budget is not None and not 1e-9 <= budget < math.inf:
        raise ValueError(f"budget: expected a positive number of GB, got {budget}")
    place = _device(device)
    on_gpu = place == "cuda"
    first, *further = _integers("contexts", contexts)
    usual = f"1024,2048,4096,8192{',32768,131072' if on_gpu else ''}"
    together = _integers("batches", batches if batches is not None else ("1,8,32,128,512" if on_gpu else "1,8"))
    suite = Suite(
        models={name: {"model": models.definition(models.named(name)), "steps": None} for name in model},
        device=place,
        dtype=dtype or ("bfloat16" if on_gpu else "float32"),
        threads=threads,
        rounds=rounds,
        state=[first, *further],
        prefill=_integers("lengths", usual if lengths is None else lengths),
        decode=[*((first, batch) for batch in together), *((context, 1) for context in further)],
        graphs=graphs,
        training=() if training is None else _integers("training", training),
        memory=None if budget is None else {"tokens": first, "budget": int(budget * 1e9)},
    )
    _measure(suite, out, None, again, "Throughput")


@app.command()
def pareto(
    suite: Annotated[str, typer.Option(help="cpu, gpu, or a YAML file.")] = "cpu",
    shard: Annotated[str | None, typer.Option(help="Only train the i-th of n parts of the models, as i/n.")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds of timing, instead of the suite's.")] = None,
    again: Annotated[bool, typer.Option(help="Repeat timings that are already in the folder.")] = False,
    out: Annotated[
        Path, typer.Option(help="Folder for measurements and report; an interrupted run resumes there.")
    ] = Path("reports/pareto"),
) -> None:
    """Train or load the models of a suite; report the recall, memory and speed of each."""
    from hybridattn.evals.pareto.suite import load

    part = None
    if shard is not None:
        i, slash, n = shard.partition("/")
        if not (slash and i.isdecimal() and n.isdecimal()):
            raise ValueError(f"shard: expected i/n, such as 1/4, got {shard!r}")
        part = int(i), int(n)
    wanted = load(suite)
    _measure(replace(wanted, rounds=rounds or wanted.rounds), out, part, again, "Recall and throughput")


def _measure(suite: "Suite", out: Path, shard: tuple[int, int] | None, again: bool, title: str) -> None:
    from hybridattn.evals.pareto.run_suite import run_suite

    _show(out, run_suite(suite, out, title=title, shard=shard, again=again))


def _show(out: Path, results: dict[str, Any]) -> None:
    """Print a report's first table and where to open it; exit with code 1 if a cache differs from its declared size."""
    from hybridattn.evals.report.build import as_table, summary
    from hybridattn.evals.report.document import overview

    if results["rows"]:
        print(f"\n{as_table(overview(results['rows'], results['points']).tables[0])}\n")
    print(f"{summary(results)}\nOpen {out / 'report.html'} or {out / 'report.md'}")
    for problem in results["problems"]:
        print(f"hybridattn: {problem}", file=sys.stderr)
    if results["problems"]:
        raise typer.Exit(1)


@app.command()
def report(
    folders: Annotated[list[Path], typer.Argument(help="Folders: one to rewrite, two to compare, or any to merge.")],
    merge: Annotated[Path | None, typer.Option(help="Folder for one report on all measurements.")] = None,
    title: Annotated[str, typer.Option(help="Title of the report.")] = "Recall and throughput",
) -> None:
    """Compare two reports, rewrite one from its measurements, or merge reports."""
    from hybridattn.evals.report import build, compare, store

    if merge is not None:
        store.merge(folders, merge)
        _show(merge, build.build(merge, title=title))
    elif len(folders) == 1:
        _show(folders[0], build.build(folders[0], title=title))
    elif len(folders) == 2:
        print(compare.report(*folders))
    else:
        raise ValueError(f"folders: expected one to rewrite, two to compare, or --merge OUT, got {len(folders)}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG.yaml", help="A file, or a configuration of the package.")],
) -> None:
    """Pretrain or fine-tune with CONFIG.yaml; --field value overrides a field. Repeat the command to resume.

    Frequent fields: --model or --preset, --data, --tokenizer, --length, --rows_per_step, --max_steps, --learning_rate,
    --output_dir. docs/training.md lists all, and the configurations of the package.
    """
    from hybridattn.training.train import main

    raise typer.Exit(main([config, *context.args]))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def linearize(
    context: typer.Context,
    model: Annotated[Path, typer.Argument(help="Folder of a Llama, Mistral or Qwen3.")],
    out: Annotated[Path, typer.Argument(help="New folder, or the folder of the run to resume.")],
    pattern: Annotated[
        str,
        typer.Option(
            "--pattern",
            help="Mixers: '1 full : 3 gla', full,gla,.. or a JSON list; full keeps the layer's attention.",
        ),
    ],
    mixer_options: Annotated[
        str, typer.Option("--mixer_options", help='Options of new mixers (JSON): {"window": {"window": 64}}.')
    ] = "{}",
    transfer_tokens: Annotated[
        int, typer.Option("--transfer_tokens", help="Maximum tokens of attention transfer.")
    ] = 20_000_000,
    lora_tokens: Annotated[int, typer.Option("--lora_tokens", help="Maximum tokens of LoRA training.")] = 20_000_000,
    transfer_learning_rate: Annotated[float, typer.Option("--transfer_learning_rate")] = 1e-3,
    lora_learning_rate: Annotated[float, typer.Option("--lora_learning_rate")] = 1e-4,
    lora_rank: Annotated[int, typer.Option("--lora_rank", min=1)] = 8,
    distill: Annotated[
        float, typer.Option("--distill", help="Weight of the divergence from the teacher in LoRA's loss, 0 to 1.")
    ] = 0.5,
    scratch_learning_rate: Annotated[
        float | None,
        typer.Option("--scratch_learning_rate", help="Also train the hybrid from scratch, at this rate."),
    ] = None,
) -> None:
    """Convert a softmax model to a hybrid by attention transfer and LoRA; accepts --data and other flags of `train`."""
    from hybridattn.evals.linearize import linearize
    from hybridattn.training.arguments import read_mapping

    try:
        code = linearize(
            model,
            out,
            context.args,
            pattern=pattern,
            mixer_options=read_mapping("mixer_options", mixer_options),
            transfer_tokens=transfer_tokens,
            lora_tokens=lora_tokens,
            transfer_learning_rate=transfer_learning_rate,
            lora_learning_rate=lora_learning_rate,
            lora_rank=lora_rank,
            distill=distill,
            scratch_learning_rate=scratch_learning_rate,
        )
    except FloatingPointError as error:
        print("hybridattn:", error, file=sys.stderr)
        code = 1
    raise typer.Exit(code)


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_PRESET", help="Folder of a saved model, or a preset.")],
    dtype: Annotated[Literal["float32", "bfloat16", "float16"], typer.Option(help="Dtype of the cache.")] = "bfloat16",
) -> None:
    """Show the mixer, parameters and state size of each layer, per sequence of 2k, 32k and 1M tokens."""
    import torch
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from hybridattn.models.decoder.configuration import without_models
    from hybridattn.models.decoder.mixer_list import describe
    from hybridattn.models.decoder.sizes import cache_spec, parameters_of
    from hybridattn.models.presets import PUBLISHED

    with without_models():
        config = _load_config(model)
    parameters = parameters_of(config)
    specs = [
        cache_spec(config, batch_size=1, tokens=tokens, dtype=getattr(torch, dtype))
        for tokens in CONTEXT_LENGTHS.values()
    ]
    rows = [
        (describe(entry), f"{parameters[i]:,}", *(_state([spec[i]]) for spec in specs))
        for i, entry in enumerate(config.mixers or ())
    ]

    title = f"{model}: elements and bytes of state per sequence, {dtype}"
    table = Table("layers", "mixer", title=title, box=box.SIMPLE)
    for heading in ("parameters each", *(f"state at {length}" for length in CONTEXT_LENGTHS)):
        table.add_column(heading, justify="right")
    start = 0
    for row, alike in groupby(rows):
        end = start + len(list(alike)) - 1
        table.add_row(f"{start}-{end}" if end > start else f"{start}", *row)
        start = end + 1
    table.add_section()
    table.add_row("model", "", f"{sum(parameters):,}", *map(_state, specs))
    if model in PUBLISHED:
        table.add_row("published", "", *PUBLISHED[model])
    Console().print(table)


def _state(layers: "list[CacheSpec]") -> str:
    from hybridattn.models.decoder.sizes import cache_elements

    size = sum(math.prod(shape) * kept.itemsize for spec in layers for shape, kept in spec.values())
    return f"{sum(map(cache_elements, layers)):,}\n{_bytes(size)}"


def _load_config(model: str) -> "HybridAttnConfig":
    from hybridattn.models.decoder import HybridAttnConfig
    from hybridattn.models.presets import PRESETS

    if model in PRESETS:
        return PRESETS[model]()
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    if not Path(model, "config.json").is_file():
        presets = sorted(PRESETS)
        raise ValueError(f"model: expected a folder with config.json or one of the presets {presets}, got {model!r}")
    try:
        config = AutoConfig.from_pretrained(model)
    except (OSError, StrictDataclassError) as error:
        raise ValueError(f"model: expected a configuration in {model!r}, got an error: {error}") from error
    if not isinstance(config, HybridAttnConfig):
        raise ValueError(f"model: expected a hybridattn model, got model_type {config.model_type!r} in {model!r}")
    return config


def _bytes(size: float) -> str:
    """Format bytes in decimal units with three digits, such as 5.73 MB."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:,.3g} GB"


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of GLA, DeltaNet, Gated DeltaNet or KDA of flash-linear-attention, of Mamba-2 of "
            "transformers, or of a released BASED model."
        ),
    ],
    target: Annotated[Path, typer.Argument(help="New folder.")],
) -> None:
    """Convert a checkpoint of another library to this library's format."""
    from hybridattn.models import convert as conversion

    model = conversion.convert(source, target)
    print(f"{target}: {len(model.config.mixers)} layers, {model.num_parameters():,} parameters")


@app.command()
def env() -> None:
    """Show versions and hardware, for bug reports."""
    import torch

    from hybridattn.measure.provenance import cpu_name, installed_version

    facts = {
        "hybridattn": hybridattn.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        **{package: installed_version(package) or "not installed" for package in ("torch", "triton", "transformers")},
        "cuda device": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
    }
    for name, value in facts.items():
        print(f"{name:<13}{value}")


if __name__ == "__main__":
    main()
