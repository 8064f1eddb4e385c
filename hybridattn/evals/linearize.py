"""`hybridattn linearize`: a pretrained softmax model becomes a hybrid in two stages, and a report says what that cost.

First the new mixers learn the outputs of the attention they replace (`TransferTrainer`), then adapters on the whole
learn to predict the text and what the teacher would say, and are merged. Recovery is the share of what the swap costs
in held-out loss that the training wins back.
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
from hybridattn.models.linearize import SHARED, from_softmax, replaced_layers, swap
from hybridattn.training import checkpoints
from hybridattn.training.arguments import DataArguments, ModelArguments, RunArguments, parse
from hybridattn.training.model_setup import build_tokenizer
from hybridattn.training.packed_rows import Place
from hybridattn.training.train import held_out_batches, train
from hybridattn.training.trainer import STREAM, StreamTrainer
from hybridattn.training.transfer import DistillTrainer, TransferTrainer, taught

SETTINGS = "settings.json"  # beside the stages, what decides them all
# Fields of `hybridattn train` that the stages are told here.
OURS = (
    *("model", "config", "preset", "tokenizer", "lora", "freeze"),
    *("max_steps", "learning_rate", "output_dir", "resume_from_checkpoint"),
)


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
    """Linearise a model, measure it beside its teacher, and write ``report.md`` and ``results.json``.

    ``out`` will hold the hybrid and its tokenizer, its adapters, the report, and the stages ``swapped``,
    ``transferred`` and, if asked for, ``scratch``, each a model. The same command again goes on where it was
    interrupted.

    Args:
        model: folder of a Llama, Mistral or Qwen3.
        out: a new folder, or that of the same run.
        flags: ``--field value`` of ``hybridattn train``, over ``configs/linearize.yaml``.
        pattern: as ``mixers`` of ``HybridAttnConfig``, or the mixer of every layer with commas between; ``full`` keeps
            the layer's softmax attention.
        mixer_options: for a mixer's name, options of its layer.
        transfer_tokens, lora_tokens: most tokens to train on in a stage; what is left of whole steps is not used.
        transfer_learning_rate, lora_learning_rate: of the stages.
        lora_rank: of the adapters; their alpha is twice that.
        distill: share of the divergence from the teacher's predictions in the loss of the adapters, from 0 to 1; the
            rest is the language-model loss.
        scratch_learning_rate: for comparison, train a new model of the hybrid's configuration on the very tokens of
            both stages; None for no such model.

    Returns:
        0, or 143 if a SIGTERM came before the end.

    Raises:
        ValueError: a bad argument; the message names it, what was expected and what was given.
        FloatingPointError: a loss is no longer finite.
    """
    settings = {name: value for name, value in locals().items() if name not in ("model", "out", "flags")}
    settings = {"model": str(model), "flags": list(flags), **settings}
    logging.disable_progress_bar()  # of every file that is written or read; the training keeps its own
    stage = partial(_arguments, model, flags)
    asked, data, args = stage(out, model=model, max_steps=1, eval_strategy="steps")
    budgets = {"transfer_tokens": transfer_tokens, "lora_tokens": lora_tokens}
    steps = [_steps(name, budget, data, args) for name, budget in budgets.items()]
    teacher = from_softmax(model)
    rows = held_out_batches(build_tokenizer(asked), teacher.config.vocab_size, data, args)
    if args.world_size > 1:
        raise ValueError(f"expected one process, got {args.world_size}: the stages measure and write in between")
    if not 0 <= distill <= 1:
        raise ValueError(f"distill: expected a share from 0 to 1, got {distill}")
    if rows is None:
        raise ValueError("eval_data: expected held-out texts to measure losses on, got none")
    set_seed(args.seed)  # the new weights are the same at every start
    student = swap(teacher, pattern.split(",") if "," in pattern else pattern, mixer_options)
    if not (replaced := replaced_layers(student, teacher)):
        raise ValueError(f"pattern: expected one that replaces a layer, got {pattern!r}, which keeps all")
    _claim(out, settings)
    source = provenance(settings)  # of the code that runs, whatever is committed meanwhile
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
        "mixers": [mixer.name for mixer in student.config.layer_mixers],
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
    """What a stage is told: the flags, and what it alone is."""
    for flag in flags:
        if (name := flag.partition("=")[0].lstrip("-").replace("-", "_")) in OURS and flag.startswith("--"):
            raise ValueError(f"{name}: expected none, since the stages have their own, got {flag!r}")
    words = list(flags)
    for name, value in {"tokenizer": tokenizer, "output_dir": output_dir, **options}.items():
        words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return parse(["linearize", *words])


def _steps(name: str, budget: int, data: DataArguments, args: RunArguments) -> int:
    """Whole optimiser steps within a budget of tokens."""
    each = (args.rows_per_step or 1) * data.length
    if budget < each:
        raise ValueError(f"{name}: expected at least the {each} tokens of a step, got {budget}")
    return budget // each


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Check that ``out`` is new or belongs to the same run, and note whose it is."""
    note = out / SETTINGS
    if not note.is_file() and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new folder or that of the same run, got {str(out)!r} with other files")
    earlier = json.loads(note.read_text()) if note.is_file() else settings
    for name, value in json.loads(json.dumps(settings)).items():
        if earlier.get(name) != value:
            raise ValueError(f"{name}: expected {earlier.get(name)!r} as before in {str(out)!r}, got {value!r}")
    if not note.is_file():
        out.mkdir(parents=True, exist_ok=True)
        note.write_text(json.dumps(settings, indent=2) + "\n")


def _end(folder: Path) -> Place:
    """Where the data of a finished run ended."""
    checkpoint, _ = checkpoints.latest(folder)
    if checkpoint is None:
        raise ValueError(f"expected a checkpoint in {folder}, got none")
    return Place(**json.loads((checkpoint / STREAM).read_text())["place"])


def _copy_missing(source: Path, target: Path) -> None:
    """Files of tokenizer and generation that are not there yet."""
    for pattern in COPIED_FILES:
        for file in source.glob(pattern):
            if not (target / file.name).exists():
                shutil.copy(file, target)


def load(folder: Path, device: torch.device) -> Any:
    """A saved model in fp32 for evaluation; a teacher attends by this library's operators, which know packed rows."""
    kind = json.loads((folder / "config.json").read_text())["model_type"]
    attention = {} if kind == HybridAttnConfig.model_type else {"attn_implementation": "hybridattn"}
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **attention)
    return model.to(device).eval()


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, rows: Sequence[dict[str, Any]]) -> float:
    """Cross-entropy in nats per predicted token over packed rows, such as `held_out_batches` gives."""
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
    """Layer -> squared error of a replaced mixer over the squared norm of the teacher's output, mean over rows."""
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
    """``(swapped - final) / (swapped - teacher)``: 1 is the teacher's loss again, 0 is nothing won.

    None where the swap cost nothing, as with windows that are as wide as the rows.
    """
    cost = losses["swapped"] - losses["teacher"]
    return (losses["swapped"] - losses["final"]) / cost if cost > 0 else None


def trained_tokens(folder: Path) -> int | None:
    """Tokens that a model was trained on by `hybridattn train`, where its last checkpoint still says so."""
    checkpoint, _ = checkpoints.latest(folder)
    if checkpoint is None:
        return None
    settings = json.loads((checkpoint / STREAM).read_text())["settings"]
    return int(checkpoint.name.rpartition("-")[2]) * settings["rows_per_step"] * settings["length"]


def command(out: Path, settings: dict[str, Any]) -> str:
    """The command line of a run."""
    words = ["hybridattn", "linearize", settings["model"], str(out)]
    for name, value in settings.items():
        if name not in ("model", "flags") and value not in (None, {}):
            words += [f"--{name}", json.dumps(value) if isinstance(value, dict) else str(value)]
    return shlex.join([*words, *settings["flags"]])


def report(results: dict[str, Any]) -> str:
    """The report as Markdown."""
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
    recovered = "none, since the swap cost nothing" if results["recovery"] is None else f"{results['recovery']:.1%}"
    return "\n".join(
        [
            f"# {source['config']['model']} linearised",
            "",
            f"Mixers: {', '.join(results['mixers'])}; {results['parameters']:,} parameters.",
            "",
            table(["model", "held-out loss, nats per token", "trained on, tokens"], cells),
            "",
            f"Recovery, (swapped - final) / (swapped - teacher): **{recovered}**.{share} "
            f"Losses are those of {tokens['held out']:,} held-out tokens.",
            "",
            table(["squared error of layer, over its output's", "swapped", "after attention transfer"], errors),
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
