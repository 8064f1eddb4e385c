"""Pretrain or fine-tune a model: ``hybridattn train``, also for ``torchrun -m`` and ``accelerate launch -m``."""

import hashlib
import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase, set_seed
from transformers.utils import logging

from . import checkpoints
from .arguments import DataArguments, ModelArguments, RunArguments, parse
from .model_setup import build_config, build_model, build_tokenizer
from .packed_rows import PackedBatches, Place
from .sources import open_documents
from .trainer import StreamTrainer

# Fields of a configuration that saving and loading change.
UNRELATED_FIELDS = ("transformers_version", "dtype", "architectures", "auto_map", "_name_or_path", "use_cache")
TERMINATED = 143  # a shell's exit code for SIGTERM: 128 + 15


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``CONFIG.yaml [--field value ...]`` (default: the process's own arguments).

    Returns:
        The exit code: 0; 2 for bad input; 1 for a loss that is not finite; 143 after a SIGTERM. Errors are printed as
        one line on stderr.
    """
    logging.disable_progress_bar()  # hides the bars for files that are read or written; training's own bar remains
    try:
        return train(*parse(sys.argv[1:] if arguments is None else arguments))
    except (ValueError, FloatingPointError, PermissionError, NotADirectoryError) as error:
        print("hybridattn:", " ".join(str(error).split()), file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2


def train(
    model_args: ModelArguments,
    data_args: DataArguments,
    run_args: RunArguments,
    *,
    trainer_class: Callable[..., StreamTrainer] = StreamTrainer,
    start: Place | None = None,
) -> int:
    """Train, resuming from the last complete checkpoint in the output folder, and save the model there.

    Args:
        model_args: the model.
        data_args: the data.
        run_args: the arguments of the trainer.
        trainer_class: class of the trainer, for instance one with another loss.
        start: position in the data to start from, for instance the end of an earlier run.

    Returns:
        0, or 143 if a SIGTERM stopped the run before the last step; a checkpoint was saved then.

    Raises:
        ValueError: an argument or a document is not as expected.
        FloatingPointError: the loss or a parameter is no longer finite.
    """
    folder = Path(run_args.output_dir or ".")
    checkpoint = find_checkpoint(folder, run_args.resume_from_checkpoint)
    tokenizer = build_tokenizer(model_args)
    config = build_config(model_args, tokenizer)
    vocab_size: int = config.get_text_config().vocab_size
    batches = training_batches(tokenizer, vocab_size, data_args, run_args)
    held_out = held_out_batches(tokenizer, vocab_size, data_args, run_args)
    set_seed(run_args.seed)
    model = build_model(model_args, config)
    settings = {**data_args.stream(), "rows_per_step": run_args.rows_per_step, "seed": run_args.seed}
    settings["data_seed"] = run_args.data_seed
    settings["parameters"] = model.num_parameters()
    settings["model"] = described_model(config, model_args)
    settings["tokenizer"] = fingerprint(tokenizer)
    if start is not None:
        batches.place = start
    trainer = trainer_class(
        model=model,
        args=run_args,
        batches=batches,
        eval_dataset=held_out,
        processing_class=tokenizer,
        settings=settings,
    )
    trainer.resume(checkpoint)
    if trainer.interrupted and trainer.state.global_step < run_args.max_steps:
        return TERMINATED
    trainer.check_finite()
    save(trainer, folder)
    return 0


def described_model(config: PreTrainedConfig, arguments: ModelArguments) -> str:
    """Return a hash of everything that determines which model is trained, by which a resumed run detects another."""
    fields = {name: value for name, value in config.to_dict().items() if name not in UNRELATED_FIELDS}
    described = [fields, list(arguments.freeze), arguments.lora]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a hash of a tokenizer's vocabulary, by which a resumed run detects another tokenizer."""
    return hashlib.sha256(json.dumps(tokenizer.get_vocab(), sort_keys=True).encode()).hexdigest()[:16]


def find_checkpoint(folder: Path, wanted: str | None) -> Path | None:
    """Return the checkpoint ``wanted``, or the last complete one in ``folder``; print skipped ones on stderr.

    Raises:
        ValueError: ``wanted`` is damaged.
    """
    if wanted is not None:
        if reason := checkpoints.fault(Path(wanted)):
            raise ValueError(f"resume_from_checkpoint: expected a complete checkpoint, got {wanted}: {reason}")
        return Path(wanted)
    found, faults = checkpoints.latest(folder)
    for reason in faults:
        print(f"hybridattn: skipping {reason}", file=sys.stderr)
    if found is not None:
        print(f"hybridattn: resuming from {found}", file=sys.stderr)
    return found


def training_batches(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, data: DataArguments, args: RunArguments
) -> PackedBatches:
    """Return the training batches of this process, after a check of the first block of documents."""
    source = open_documents(data.data, subset=data.subset, split=data.split, sample_by=data.sample_by)
    batches = PackedBatches(
        source,
        tokenizer,
        column=data.column,
        vocab_size=vocab_size,
        length=data.length,
        rows=args.per_device_train_batch_size,
        block=data.shuffle,
        seed=args.seed if args.data_seed is None else args.data_seed,
        skip_empty=data.skip_empty,
        process=args.process_index,
        processes=args.world_size,
    )
    batches.check()
    return batches


def held_out_batches(
    tokenizer: PreTrainedTokenizerBase, vocab_size: int, data: DataArguments, args: RunArguments
) -> list[dict[str, Any]] | None:
    """Return the first rows of the evaluation data, the same at every evaluation; None if evaluation is off."""
    if args.eval_strategy == "no" or data.eval_data is None:
        return None
    try:
        source = open_documents(data.eval_data, subset=data.subset, split=data.eval_split, sample_by=data.sample_by)
        batches = PackedBatches(
            source,
            tokenizer,
            column=data.column,
            vocab_size=vocab_size,
            length=data.length,
            rows=(at_once := min(args.per_device_train_batch_size, data.eval_rows)),
            block=1,
            skip_empty=data.skip_empty,
        )
        batches.check()
    except ValueError as error:
        raise ValueError(f"eval_data: {error}") from error
    rows = list(islice(batches, data.eval_rows // at_once))
    for row in rows:
        del row["place"]
    return rows


def save(trainer: StreamTrainer, folder: Path) -> None:
    """Save the model and its tokenizer; for LoRA, save the adapters in ``adapter`` and the model with merged adapters.

    Under FSDP only the adapters are saved, since no process holds the whole model.
    """
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    if not hasattr(model, "merge_and_unload"):
        trainer.save_model(str(folder))
        return
    trainer.save_model(str(folder / "adapter"))
    if trainer.args.should_save and not trainer.is_fsdp_enabled:
        model.merge_and_unload().save_pretrained(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    sys.exit(main())
