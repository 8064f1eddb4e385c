"""Arguments of ``hybridattn train``: dataclasses, read from a YAML file and from ``--field value`` options over it."""

import json
import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

CONFIGS = Path(__file__).parent / "configs"


@dataclass
class ModelArguments:
    """The model to train: a new one from ``preset`` or ``config``, or a saved ``model``."""

    preset: str | None = field(default=None, metadata={"help": "A new model of this published shape."})
    config: dict | str | None = field(
        default=None, metadata={"help": "Fields of HybridAttnConfig, or of a model_type of transformers (JSON)."}
    )
    model: str | None = field(default=None, metadata={"help": "A saved model: a folder, or a name on the Hub."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "A folder, a name on the Hub, or 'bytes' (built in). Default: the model's."}
    )
    lora: dict | str | None = field(
        default=None, metadata={"help": "Train LoRA adapters only: arguments of peft.LoraConfig (JSON)."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parameters not to train: patterns such as model.embed_tokens.*"}
    )

    def __post_init__(self):
        self.config, self.lora = read_mapping("config", self.config), read_mapping("lora", self.lora)
        new = self.preset is not None or self.config is not None
        if new == (self.model is not None):
            raise ValueError(f"model: expected either model, or preset or config, got {'both' if new else 'neither'}")
        if self.model is None and self.lora is not None:
            raise ValueError("lora: expected a saved model to adapt, got a new one")
        if self.model is None and self.tokenizer is None:
            raise ValueError("tokenizer: expected a name, a folder or 'bytes' for a new model, got none")


@dataclass
class DataArguments:
    """The training and evaluation data. See docs/training.md."""

    data: str = field(default="python", metadata={"help": "A file, a folder, a data set on the Hub, or 'python'."})
    subset: str | None = field(default=None, metadata={"help": "Subset of a data set on the Hub."})
    split: str = field(default="train", metadata={"help": "Split of a data set on the Hub, or of 'python'."})
    column: str = field(default="text", metadata={"help": "Column with texts, or with lists of token ids."})
    sample_by: str = field(
        default="document", metadata={"help": "Document in text files: 'document' (a file), 'paragraph' or 'line'."}
    )
    length: int = field(default=2048, metadata={"help": "Tokens per row."})
    shuffle: int = field(default=1000, metadata={"help": "Documents read ahead and shuffled; 1 for no shuffling."})
    skip_empty: bool = field(default=False, metadata={"help": "Skip documents without tokens."})
    eval_data: str | None = field(
        default=None, metadata={"help": "Evaluation data, as for data. Default: 'python' if data is 'python'."}
    )
    eval_split: str = field(default="test", metadata={"help": "Split of eval_data."})
    eval_rows: int = field(default=64, metadata={"help": "Rows of eval_data to evaluate on."})

    def __post_init__(self):
        if self.eval_data is None and self.data == "python":
            self.eval_data = "python"

    def stream(self) -> dict[str, Any]:
        """Return the arguments that determine the stream of training tokens, as JSON values."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("eval_")}


@dataclass
class RunArguments(TrainingArguments):
    """transformers' ``TrainingArguments`` with defaults for streams of packed rows, and further arguments."""

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    adam_beta2: float = 0.95
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    report_to: None | str | list[str] = "tensorboard"  # noqa: RUF036  (HfArgumentParser parses the second type)
    save_total_limit: int | None = 3
    per_device_eval_batch_size: int = 1
    ddp_find_unused_parameters: bool | None = False
    rows_per_step: int | None = field(
        default=None,
        metadata={"help": "Rows per optimiser step over all processes; determines gradient accumulation."},
    )
    peak_flops: float | None = field(
        default=None, metadata={"help": "Peak FLOP/s of one device, for MFU. Default: published, else measured."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        # PackedBatches packs, counts and divides the batches, and resumes a stream at its position without replaying.
        self.remove_unused_columns, self.prediction_loss_only, self.ignore_data_skip = False, True, True
        with warnings.catch_warnings():  # transformers before 5.23 does not know the new name, activation_checkpointing
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            super().__post_init__()
        if self.max_steps <= 0:
            raise ValueError(f"max_steps: expected a positive number (the data is a stream), got {self.max_steps}")
        if self.n_gpu > 1:  # Trainer would split a packed row between the GPUs
            raise ValueError(
                f"GPUs: expected one per process, got {self.n_gpu}: start with torchrun --nproc-per-node {self.n_gpu} "
                "-m hybridattn.training.train, or select one with CUDA_VISIBLE_DEVICES"
            )
        if self.dataloader_num_workers not in (0, 1):
            raise ValueError(f"dataloader_num_workers: expected 0 or 1, got {self.dataloader_num_workers}")
        if self.load_best_model_at_end or self.auto_find_batch_size:
            raise ValueError("load_best_model_at_end, auto_find_batch_size: expected false, got true")
        if self.fp16:
            raise ValueError("fp16: expected false (bf16 needs no loss scaling), got true")
        for name in ("per_device_train_batch_size", "rows_per_step"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name}: expected a positive number, got {value}")
        at_once = self.per_device_train_batch_size * self.world_size
        if self.rows_per_step is None:
            self.rows_per_step = at_once * self.gradient_accumulation_steps
        elif self.rows_per_step % at_once:
            raise ValueError(
                f"rows_per_step: expected a multiple of {at_once}, per_device_train_batch_size "
                f"{self.per_device_train_batch_size} times {self.world_size} processes, got {self.rows_per_step}"
            )
        self.gradient_accumulation_steps = self.rows_per_step // at_once


def read_mapping(name: str, value: dict | str | None) -> dict[str, Any] | None:
    """Return a mapping unchanged, or parse it from JSON; argument ``name`` in the ValueError for anything else."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: expected JSON, got {value!r}: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mapping, got {value!r}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML loader that reads 3e-4 as a number; YAML 1.1 reads it as a string."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read ``CONFIG.yaml [--field value ...]``.

    Args:
        arguments: the path of a YAML file, or the name of a shipped one (``tiny_cpu``), then overrides.

    Raises:
        ValueError: no such file, an unknown field, or a value of the wrong type.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"CONFIG: expected a YAML file or one of {shipped()} as first argument, got {arguments[:1]}")
    path = Path(arguments[0])
    if not path.is_file() and arguments[0] in shipped():
        path = CONFIGS / f"{arguments[0]}.yaml"
    if not path.is_file():
        raise ValueError(f"CONFIG: expected a YAML file or one of {shipped()}, got {arguments[0]!r}")
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: expected YAML, got an error: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of fields, got {values!r:.50}")
    kinds = (ModelArguments, DataArguments, RunArguments)
    if unknown := sorted(set(values) - {entry.name for kind in kinds for entry in fields(kind)}):
        raise ValueError(f"{path}: expected fields of {[kind.__name__ for kind in kinds]}, got {unknown}")
    parser = _Parser(kinds, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.set_defaults(**{"output_dir": f"runs/{path.stem}", **values})
    model, data, run, unknown = parser.parse_args_into_dataclasses(
        arguments[1:], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"options: expected --field value of {[kind.__name__ for kind in kinds]}, got {unknown}")
    return model, data, run


def shipped() -> list[str]:
    """Return the names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))
