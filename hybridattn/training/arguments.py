"""What a training run is told: a YAML file, and ``--field value`` over it."""

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
    """Which model is trained. ``preset`` and ``config`` make a new one, ``model`` is a saved one to go on from."""

    preset: str | None = field(default=None, metadata={"help": "A new model of this published shape."})
    config: dict | str | None = field(
        default=None, metadata={"help": "Arguments of HybridAttnConfig, or of a model_type of transformers (JSON)."}
    )
    model: str | None = field(default=None, metadata={"help": "A saved model: a folder, or a name on the Hub."})
    tokenizer: str | None = field(
        default=None, metadata={"help": "A folder or a name on the Hub; 'bytes' is built in. Default: the model's."}
    )
    lora: dict | str | None = field(
        default=None, metadata={"help": "Train adapters only: arguments of peft.LoraConfig (JSON)."}
    )
    freeze: list[str] = field(
        default_factory=list, metadata={"help": "Parameters left as they are: patterns such as model.embed_tokens.*"}
    )

    def __post_init__(self):
        self.config, self.lora = read_mapping("config", self.config), read_mapping("lora", self.lora)
        new = self.preset is not None or self.config is not None
        if new == (self.model is not None):
            raise ValueError(f"model: expected it or else preset or config, got {'both' if new else 'none of them'}")
        if self.model is None and self.lora is not None:
            raise ValueError("lora: expected a saved model to adapt, got a new one")
        if self.model is None and self.tokenizer is None:
            raise ValueError("tokenizer: expected a name, a folder or 'bytes' for a new model, got none")


@dataclass
class DataArguments:
    """What it is trained on. See docs/training.md."""

    data: str = field(default="python", metadata={"help": "A file, a folder, a data set on the Hub, or 'python'."})
    subset: str | None = field(default=None, metadata={"help": "Of a data set on the Hub."})
    split: str = field(default="train", metadata={"help": "Of a data set on the Hub, or 'test' of 'python'."})
    column: str = field(default="text", metadata={"help": "Column of texts, or of lists of token ids."})
    sample_by: str = field(default="document", metadata={"help": "Of text files: 'document', 'paragraph' or 'line'."})
    length: int = field(default=2048, metadata={"help": "Tokens per row."})
    shuffle: int = field(default=1000, metadata={"help": "Documents read ahead and put in random order; 1 for none."})
    skip_empty: bool = field(default=False, metadata={"help": "Leave out documents without tokens."})
    eval_data: str | None = field(default=None, metadata={"help": "As data; default: 'test' of 'python', or none."})
    eval_split: str = field(default="test", metadata={"help": "Of eval_data."})
    eval_rows: int = field(default=64, metadata={"help": "Rows of eval_data that are scored."})

    def __post_init__(self):
        if self.eval_data is None and self.data == "python":
            self.eval_data = "python"

    def stream(self) -> dict[str, Any]:
        """What decides which tokens come when, as JSON values."""
        return {name: value for name, value in asdict(self).items() if not name.startswith("eval_")}


@dataclass
class RunArguments(TrainingArguments):
    """transformers' arguments, with defaults for streams of packed rows, and a few more."""

    learning_rate: float = 3e-4
    lr_scheduler_type: str = "cosine_with_min_lr"
    adam_beta2: float = 0.95
    logging_steps: float = 10
    logging_nan_inf_filter: bool = False
    report_to: None | str | list[str] = "tensorboard"  # noqa: RUF036  (HfArgumentParser takes the second kind)
    save_total_limit: int | None = 3
    per_device_eval_batch_size: int = 1
    ddp_find_unused_parameters: bool | None = False
    rows_per_step: int | None = field(
        default=None,
        metadata={"help": "Rows per optimiser step over all processes; gradient accumulation follows from it."},
    )
    peak_flops: float | None = field(
        default=None, metadata={"help": "FLOP/s of one device, for MFU. Default: published, or else measured."}
    )

    def __post_init__(self):
        if not torch.accelerator.is_available():
            self.use_cpu = True
        if self.lr_scheduler_type == "cosine_with_min_lr" and self.lr_scheduler_kwargs is None:
            self.lr_scheduler_kwargs = {"min_lr_rate": 0.1}
        # Batches are packed, counted and divided between processes by us; a stream is resumed, never replayed.
        self.remove_unused_columns, self.prediction_loss_only, self.ignore_data_skip = False, True, True
        with warnings.catch_warnings():  # the new name, activation_checkpointing, is unknown before transformers 5.23
            warnings.filterwarnings("ignore", "`gradient_checkpointing", FutureWarning)
            super().__post_init__()
        if self.max_steps <= 0:
            raise ValueError(f"max_steps: expected a positive number (the data is a stream), got {self.max_steps}")
        if self.n_gpu > 1:  # Trainer would split packed rows between them
            raise ValueError(
                f"expected one GPU per process, got {self.n_gpu}: start with torchrun --nproc-per-node {self.n_gpu} "
                "-m hybridattn.training.train, or choose one by CUDA_VISIBLE_DEVICES"
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
    """A mapping as it is, or read from JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{name}: expected JSON, got {value!r}: {error}") from error
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{name}: expected a mapping, got {value!r}")
    return value


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number, as people write it, and not a string, as YAML 1.1 has it."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


class _Parser(HfArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(arguments: list[str]) -> tuple[ModelArguments, DataArguments, RunArguments]:
    """Read ``CONFIG.yaml [--field value ...]``.

    Args:
        arguments: the path of a YAML file, or the name of a shipped one (``tiny_cpu``), then what is changed of it.

    Raises:
        ValueError: no such file, an unknown field, or a value of the wrong kind.
    """
    if not arguments or arguments[0].startswith("-"):
        raise ValueError(f"CONFIG: expected a YAML file or one of {shipped()} first, got {arguments[:1]}")
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
        raise ValueError(f"{path}: expected fields and values, got {values!r:.50}")
    kinds = (ModelArguments, DataArguments, RunArguments)
    if unknown := sorted(set(values) - {entry.name for kind in kinds for entry in fields(kind)}):
        raise ValueError(f"{path}: expected fields of {[kind.__name__ for kind in kinds]}, got {unknown}")
    parser = _Parser(kinds, allow_abbrev=False)  # pyright: ignore[reportArgumentType]
    parser.set_defaults(**{"output_dir": f"runs/{path.stem}", **values})
    model, data, run, unknown = parser.parse_args_into_dataclasses(
        arguments[1:], return_remaining_strings=True, look_for_args_file=False
    )
    if unknown:
        raise ValueError(f"expected --field value of {[kind.__name__ for kind in kinds]}, got {unknown}")
    return model, data, run


def shipped() -> list[str]:
    """Names of the configurations that come with the package."""
    return sorted(path.stem for path in CONFIGS.glob("*.yaml"))
