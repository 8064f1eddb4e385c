"""The command `hybridattn linearize`: convert a softmax model to a hybrid in two training stages, and report losses.

First the new mixers learn the outputs of the attention that they replace (`TransferTrainer`). Then LoRA adapters on the
whole model learn to predict the text and the teacher's predictions (`DistillTrainer`), and are merged. Recovery is the
share of the increase in held-out loss, caused by the swap of mixers, that training removes.
"""

import json
import shlex
import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, set_seed
from transformers.utils import logging

from hybridattn.measure.markdown import table
from hybridattn.measure.output_folder import RESULTS
from hybridattn.measure.provenance import installed_version, provenance
from hybridattn.models.convert import COPIED_FILES
from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.decoder.mixer_list import Entry, describe
from hybridattn.models.linearize import SHARED, from_softmax, replaced_layers, swap
from hybridattn.training import checkpoints
from hybridattn.training.arguments import DataArguments, ModelArguments, RunArguments, parse
from hybridattn.training.distillation import DistillTrainer, TransferTrainer, taught
from hybridattn.training.model_setup import build_tokenizer
from hybridattn.training.packed_rows import Place
from hybridattn.training.train import held_out_batches, train
from hybridattn.training.trainer import STREAM, StreamTrainer

SETTINGS = "settings.json"  # in the output folder: the arguments that determine the run
# Fields of `hybridattn train` that this command sets for each stage.
OURS = (
    *("model", "config", "preset", "tokenizer", "lora", "freeze"),
    *("max_steps", "learning_rate", "output_dir", "resume_from_checkpoint"),
)


def read_entries(pattern: str) -> str | list[Entry]:
    """Return a pattern unchanged, and a list of entries for JSON or comma-separated names.

    Raises:
        ValueError: the text begins with a bracket and is not JSON.
    """
    if not pattern.lstrip().startswith("["):
        return [name.strip() for name in pattern.split(",")] if "," in pattern else pattern
    try:
        return json.loads(pattern)
    except json.JSONDecodeError as error:
        raise ValueError(f"pattern: expected JSON after a bracket, got {pattern!r}: {error}") from error


def linearize(
    model: Path,
    out: Path,
    flags: Sequence[str] = (),
    *,
    pattern: str,
    mixer_options: dict[str, dict[str, Any]] | None = None,
    transfer_tokens: int = 20_000_000,
    lora_tokens: int = 20_000_000,
    transfer_learning_rate: float = 1e-3,
    lora_learning_rate: float = 1e-4,
    lora_rank: int = 8,
    distill: float = 0.5,
    scratch_learning_rate: float | None = None,
) -> int:
    """Linearise a model, measure it and its teacher, and write ``report.md`` and ``results.json``.

    Afterwards ``out`` contains the hybrid with its tokenizer and adapters, the report, and a folder with a model for
    each stage: ``swapped``, ``transferred`` and, if requested, ``scratch``. The same command resumes an interrupted
    run.

    Args:
        model: folder of a Llama, Mistral or Qwen3.
        out: a new folder, or the folder of an interrupted run with the same arguments.
        flags: ``--field value`` of ``hybridattn train``, over ``configs/linearize.yaml``.
        pattern: ``mixers`` of ``HybridAttnConfig``: a pattern, or the entries of all layers, comma-separated or as
            JSON; ``full`` keeps the layer's softmax attention.
        mixer_options: by mixer name, options of its layers.
        transfer_tokens, lora_tokens: token budget of each stage, rounded down to whole optimiser steps.
        transfer_learning_rate, lora_learning_rate: peak learning rate of each stage.
        lora_rank: rank of the adapters; their alpha is twice the rank.
        distill: weight of the divergence from the teacher's predictions in the loss of the second stage, from 0 to 1;
            the language-model loss has the rest.
        scratch_learning_rate: for comparison, also train a new model with the hybrid's configuration on the tokens of
            both stages, at this rate; None for no such model.

    Returns:
        0, or 143 if a SIGTERM stopped the run.

    Raises:
        ValueError: a bad argument; the message has its name, the expected and the given value.
        FloatingPointError: a loss is no longer finite.
    """
    settings = {name: value for name, value in locals().items() if name not in ("model", "out", "flags")}
    settings = {"model": str(model), "flags": list(flags), **settings}
    logging.disable_progress_bar()  # hides the bars for files that are read or written; training's own bar remains
    stage = partial(_arguments, model, flags)
    teacher_args, data, args = stage(out, model=model, max_steps=1, eval_strategy="steps")
    budgets = {"transfer_tokens": transfer_tokens, "lora_tokens": lora_tokens}
    steps = [_steps(name, budget, data, args) for name, budget in budgets.items()]
    teacher = from_softmax(model)
    rows = held_out_batches(build_tokenizer(teacher_args), teacher.config.vocab_size, data, args)
    if args.world_size > 1:
        raise ValueError(f"processes: expected one, since stages write files between them, got {args.world_size}")
    if not 0 <= distill <= 1:
        raise ValueError(f"distill: expected a share from 0 to 1, got {distill}")
    entries = read_entries(pattern)
    if rows is None:
        raise ValueError("eval_data: expected held-out texts to measure losses on, got None")
    set_seed(args.seed)  # a resumed run must initialise the same weights
    student = swap(teacher, entries, mixer_options)
    if not (replaced := replaced_layers(student, teacher)):
        raise ValueError(f"pattern: expected one that replaces a layer, got {pattern!r}, which keeps all")
    _claim(out, settings)
    source = provenance(settings)  # before training, since a commit during the run would change it
    source["versions"]["peft"] = installed_version("peft")
    folders = {name: out / name for name in ("swapped", "transferred", "scratch")} | {"teacher": model, "final": out}
    student.save_pretrained(folders["swapped"])

    own = tuple(f"model.layers.{i}.mixer." for i in replaced)
    options = {
        "model": folders["swapped"],
        "freeze": [name for name, _ in student.named_parameters() if not name.startswith(own)],
        "max_steps": steps[0],
        "learning_rate": transfer_learning_rate,
    }
    transfer = partial(TransferTrainer, teacher=teacher)
    if code := train(*stage(folders["transferred"], **options), trainer_class=transfer):
        return code
    options = {
        "model": folders["transferred"],
        "lora": json.dumps({"r": lora_rank, "lora_alpha": 2 * lora_rank}),
        "max_steps": steps[1],
        "learning_rate": lora_learning_rate,
    }
    adapt = partial(DistillTrainer, teacher=teacher, share=distill) if distill else StreamTrainer
    if code := train(*stage(out, **options), trainer_class=adapt, start=_end(folders["transferred"])):
        return code
    if scratch_learning_rate is None:
        del folders["scratch"]
    else:
        shape = {name: getattr(student.config, name) for name in (*SHARED, "mixers", "mixer_options")}
        del shape["dtype"]
        options = {"config": json.dumps(shape), "max_steps": sum(steps), "learning_rate": scratch_learning_rate}
        if code := train(*stage(folders["scratch"], **options)):
            return code
    _copy_missing(model, out)

    losses = {name: held_out_loss(load(folder, args.device), rows) for name, folder in folders.items()}
    errors = [attention_errors(load(folders[name], args.device), teacher, rows) for name in ("swapped", "transferred")]
    tokens = [count * (args.rows_per_step or 1) * data.length for count in steps]
    results = {
        "provenance": source,
        "command": command(out, settings),
        "mixers": [describe(entry) for entry in student.config.mixers],
        "parameters": student.num_parameters(),
        "losses": losses,
        "recovery": recovery(losses),
        "attention_errors": {layer: [error[layer] for error in errors] for layer in replaced},
        "tokens": {
            "teacher": trained_tokens(model),
            "transfer": tokens[0],
            "lora": tokens[1],
            "scratch": sum(tokens) if "scratch" in folders else None,
            "held out": sum(int((row["labels"] != -100).sum()) for row in rows),
        },
    }
    (out / RESULTS).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (out / "report.md").write_text(report(results), encoding="utf-8")
    print(report(results))
    return 0


def _arguments(
    tokenizer: Path, flags: Sequence[str], output_dir: Path, **options: Any
) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Return the training arguments of a stage: the user's flags and the options of this stage.

    Raises:
        ValueError: a flag that this command sets itself.
    """
    for flag in flags:
        if (name := flag.partition("=")[0].lstrip("-").replace("-", "_")) in OURS and flag.startswith("--"):
            raise ValueError(f"{name}: expected no such flag, since linearize sets it for each stage, got {flag!r}")
    words = list(flags)
    for name, value in {"tokenizer": tokenizer, "output_dir": output_dir, **options}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parse(["linearize", *words])


def _steps(name: str, budget: int, data: DataArguments, args: RunArguments) -> int:
    """Return the number of whole optimiser steps within a budget of tokens; argument ``name`` in the ValueError."""
    each = (args.rows_per_step or 1) * data.length
    if budget < each:
        raise ValueError(f"{name}: expected at least the {each} tokens of a step, got {budget}")
    return budget // each


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Check that ``out`` is new or belongs to a run with the same settings, and save the settings there."""
    note = out / SETTINGS
    if not note.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new folder or that of the same run, got {str(out)!r} with other files")
    earlier = json.loads(note.read_text()) if note.is_file() else settings
    for name, value in json.loads(json.dumps(settings)).items():
        if earlier.get(name) != value:
            raise ValueError(f"{name}: expected {earlier.get(name)!r} as in {str(note)!r}, got {value!r}")
    if not note.is_file():
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, indent=2) + "\n")


def _end(folder: Path) -> Place:
    """Return the position in the data after a finished run."""
    checkpoint, _ = checkpoints.latest(folder)
    if checkpoint is None:
        raise ValueError(f"{folder}: expected a checkpoint, got none")
    return Place(**json.loads((checkpoint / STREAM).read_text())["place"])


def _copy_missing(source: Path, target: Path) -> None:
    """Copy files of the tokenizer and of generation that ``target`` does not have yet."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            if not (target / file.name).exists():
                shutil.copy(file, target)


def load(folder: Path, device: torch.device) -> Any:
    """Load a saved model in fp32 for evaluation; teachers use this library's attention, which supports packed rows."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    attention = {} if kind == HybridAttnConfig.model_type else {"attn_implementation": "hybridattn"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention)
    return model.to(device).eval()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    """Compute the cross entropy in nats per predicted token over packed rows, as from `held_out_batches`."""
    nats = tokens = 0.0
    for row in rows:
        count = int((row["labels"] != -100).sum())
        nats += model(**_moved(row, model.device), use_cache=False).loss.item() * count
        tokens += count
    return nats / tokens


@torch.no_grad()
def attention_errors(
    student: HybridAttnForCausalLM, teacher: HybridAttnForCausalLM, rows: Sequence[dict[str, Any]]
) -> dict[int, float]:
    """Compute the relative squared errors of replaced mixers (see `taught`), by layer, averaged over rows."""
    totals: dict[int, float] = {}
    with taught(student, teacher) as errors:
        for row in rows:
            inputs = {name: x for name, x in _moved(row, student.device).items() if name != "labels"}
            student.model(**inputs, use_cache=False)
            for layer, error in errors.items():
                totals[layer] = totals.get(layer, 0.0) + error.item() / len(rows)
    return totals


def _moved(row: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in row.items()}


def recovery(losses: dict[str, float]) -> float | None:
    """Compute ``(swapped - final) / (swapped - teacher)``: 1 is the teacher's loss, 0 the loss before training.

    None if the swap did not increase the loss, for instance with windows as wide as the rows.
    """
    cost = losses["swapped"] - losses["teacher"]
    return (losses["swapped"] - losses["final"]) / cost if cost > 0 else None


def trained_tokens(folder: Path) -> int | None:
    """Return the number of tokens that `hybridattn train` trained a model on, or None without a checkpoint."""
    checkpoint, _ = checkpoints.latest(folder)
    if checkpoint is None:
        return None
    settings = json.loads((checkpoint / STREAM).read_text())["settings"]
    return int(checkpoint.name.rpartition("-")[2]) * settings["rows_per_step"] * settings["length"]


def command(out: Path, settings: dict[str, Any]) -> str:
    """Return the command line of a run."""
    words = ["hybridattn", "linearize", settings["model"], str(out)]
    for name, value in settings.items():
        if name not in ("model", "flags") and value not in (None, {}):
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join([*words, *settings["flags"]])


def report(results: dict[str, Any]) -> str:
    """Return the report as Markdown."""
    losses, tokens, source = results["losses"], results["tokens"], results["provenance"]
    trained = {
        "teacher": tokens["teacher"],
        "swapped": 0,
        "transferred": tokens["transfer"],
        "final": tokens["transfer"] + tokens["lora"],
        "scratch": tokens["scratch"],
    }
    names = {
        "teacher": "teacher",
        "swapped": "swapped, not trained",
        "transferred": "after attention transfer",
        "final": "after LoRA",
        "scratch": "the hybrid from scratch",
    }
    shown = [name for name in names if name in losses]
    cells = [[names[name], f"{losses[name]:.4f}", _count(trained[name])] for name in shown]
    errors = [
        [f"{layer} ({results['mixers'][int(layer)]})", *(f"{error:.3f}" for error in pair)]
        for layer, pair in results["attention_errors"].items()
    ]
    share = ""
    if tokens["teacher"]:
        share = f" Both stages took {trained['final'] / tokens['teacher']:.1%} of the teacher's tokens."
    recovered = (
        "none, since the swap did not increase the loss"
        if results["recovery"] is None
        else f"{results['recovery']:.1%}"
    )
    return "\n".join(
        [
            f"# {source['config']['model']} linearised",
            "",
            f"Mixers: {', '.join(results['mixers'])}; {results['parameters']:,} parameters.",
            "",
            table(["model", "held-out loss, nats per token", "trained on, tokens"], cells),
            "",
            f"Recovery, (swapped - final) / (swapped - teacher): **{recovered}**.{share} "
            f"Losses are means over {tokens['held out']:,} held-out tokens.",
            "",
            table(["relative squared error, by layer", "swapped", "after attention transfer"], errors),
            "",
            f"    {results['command']}",
            "",
            f"Commit {source['commit']}; {source['cpu']}, {source['threads']} threads; "
            + ", ".join(f"{name} {version}" for name, version in source["versions"].items() if version)
            + ".",
            "",
        ]
    )


def _count(tokens: int | None) -> str:
    return "unknown" if tokens is None else f"{tokens:,}"
