"""transformers' Trainer for a stream of packed rows; a run can stop and resume at any step."""

import json
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback

from hybridattn.models.decoder import HybridAttnForCausalLM

from . import checkpoints
from .arguments import RunArguments
from .flops import count
from .hardware import peak_flops
from .packed_rows import PackedBatches, Place

STREAM = "stream.json"


class StreamTrainer(Trainer):
    """A Trainer whose checkpoints contain the position in the data and are written atomically.

    Args:
        batches: the training data.
        settings: values that must not change when a run is resumed, as JSON values; saved in the checkpoints.
        kwargs: arguments of Trainer.

    Attributes:
        interrupted: whether a SIGTERM has ended the training; a checkpoint was saved then.
    """

    args: RunArguments

    def __init__(self, *, batches: PackedBatches, settings: dict[str, Any], **kwargs):
        super().__init__(**kwargs, data_collator=_single)
        self.batches, self.settings = batches, settings
        self.place: dict[str, Any] = {}
        self.interrupted = self.finished = self._terminated = False
        self._staging: Path | None = None
        self._unlogged = (0.0, 0)  # for a resumed run: sum of the loss since the last log line, and that line's step
        model: Any = self.accelerator.unwrap_model(self.model)
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._ours = isinstance(base, HybridAttnForCausalLM)
        self._skips_logits = self._ours and type(base.lm_head) is nn.Linear
        self._flops_of = count(model) if self._ours else None
        self._flops = self._peak = 0.0
        self._clock, self._clock_step = 0.0, 0
        self.add_callback(_Steps(self))

    def resume(self, checkpoint: Path | None) -> None:
        """Train from the beginning or from a checkpoint.

        Raises:
            ValueError: the checkpoint's settings differ from those of this run.
            FloatingPointError: the loss is no longer finite.
        """
        if checkpoint is not None:
            kept = json.loads((checkpoint / STREAM).read_text())
            for name, value in self.settings.items():
                if kept["settings"].get(name, value) != value:  # an older checkpoint may lack a setting
                    raise ValueError(
                        f"{name}: expected {kept['settings'].get(name)!r} as in {checkpoint}, got {value!r}; "
                        "use another output_dir for a new run"
                    )
            self.place, self._unlogged = kept["place"], tuple(kept["unlogged"])
            self.batches.place = Place(**self.place)
            self.finished = int(checkpoint.name.rpartition("-")[2]) >= self.args.max_steps
        before = signal.signal(signal.SIGTERM, self._note_termination)
        try:
            self.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        finally:
            signal.signal(signal.SIGTERM, before)

    def get_train_dataloader(self) -> DataLoader:
        """Return a loader of this process's batches, which accelerate must not divide again."""
        if self.finished:
            return DataLoader([])  # pyright: ignore[reportArgumentType]
        return DataLoader(
            self.batches,
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory and torch.cuda.is_available(),
            generator=torch.Generator(),  # the global generator's state would otherwise differ in a resumed run
        )

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs):
        """Compute the loss as Trainer does; models of this package compute it in chunks of logits."""
        if self._skips_logits:
            inputs = {**inputs, "skip_logits": True}
        return super().compute_loss(model, inputs, *args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args, **kwargs) -> Tensor:
        """Run Trainer's step, and count operations.

        Raises:
            FloatingPointError: the loss is not finite; the batch was saved in the output folder.
        """
        inputs = dict(inputs)
        self.place = inputs.pop("place")
        if self._flops_of is not None:
            self._flops += self._flops_of.training(inputs["cu_seq_lens_q"].diff().tolist())
        loss = super().training_step(model, inputs, *args, **kwargs)
        if not torch.isfinite(loss):  # synchronises with the device, once per micro-batch
            step = self.state.global_step + 1
            path = Path(self.args.output_dir or ".", f"not-finite-step{step}-process{self.args.process_index}.pt")
            torch.save({**inputs, "place": self.place, "loss": loss.item()}, path)
            raise FloatingPointError(
                f"loss: expected a finite value, got {loss.item()} at step {step}; batch in {path}"
            )
        return loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add tokens/s, MFU, peak memory (GB) and remaining time (minutes) to log lines with the training loss."""
        if "loss" in logs and self.state.global_step > self._clock_step:
            now = time.perf_counter()
            seconds, steps = now - self._clock, self.state.global_step - self._clock_step
            tokens = steps * self.settings["rows_per_step"] * self.settings["length"]
            logs["tokens_per_second"] = tokens / seconds
            if self._flops_of is not None:
                logs["mfu"] = self._reduced(self._flops, "mean") / seconds / self._peak
            logs["memory_gb"] = self._memory() / 1e9
            logs["eta_minutes"] = seconds / steps * (self.state.max_steps - self.state.global_step) / 60
            self._clock, self._clock_step, self._flops = now, self.state.global_step, 0.0
        super().log(logs, *args, **kwargs)

    def check_finite(self) -> None:
        """Raise a FloatingPointError if a trained parameter is not finite."""
        model: Any = self.model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        parts = (x.to_local() if isinstance(x, DTensor) else x for x in trained)  # FSDP: this process's shard
        if not all(part.isfinite().all() for part in parts):
            raise FloatingPointError(
                f"parameters: expected finite values, got inf or nan at step {self.state.global_step}"
            )

    def _note_termination(self, *_) -> None:
        self._terminated = True  # only a flag, since a signal can arrive within a step; `_Steps` acts on it

    def _reduced(self, value: float, how: str) -> float:
        """Return the "mean" or "sum" of a number over all processes."""
        if self.args.world_size == 1:
            return value
        every: Any = self.accelerator.reduce(torch.tensor(value, device=self.args.device), how)
        return every.item()

    def _memory(self) -> int:
        """Return the peak memory in bytes: allocations on a GPU, or the resident set of the process on a CPU."""
        if self.args.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.args.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _get_output_dir(self, trial: Any) -> str:
        """Return the folder for Trainer's checkpoints; the staging folder while a checkpoint is being written."""
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save Trainer's checkpoint and the position in the data in the staging folder, then rename it.

        The main process renames it after all processes have written their files.
        """
        self.check_finite()
        folder = Path(super()._get_output_dir(trial))
        self._staging = folder / checkpoints.STAGING
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        super()._save_checkpoint(model, trial)
        unlogged = self._reduced(self._tr_loss.item(), "mean"), self._globalstep_last_logged
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            staged = self._staging / f"checkpoint-{self.state.global_step}"
            kept = {"place": self.place, "unlogged": unlogged, "settings": self.settings}
            (staged / STREAM).write_text(json.dumps(kept, indent=2))
            checkpoints.publish(staged, folder, keep=self.args.save_total_limit)
            self._staging.rmdir()
        self._staging = None
        self.accelerator.wait_for_everyone()


def _single(items: list[Any]) -> Any:
    """Return the only item, since the data loader's items are already batches."""
    (item,) = items
    return item


class _Steps(TrainerCallback):
    """Callbacks between steps: restore the loss and clock of a resumed run, count passes, stop after a SIGTERM."""

    def __init__(self, trainer: StreamTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        trainer, args = self.trainer, self.trainer.args
        if state.global_step and not trainer.finished:
            loss, trainer._globalstep_last_logged = trainer._unlogged
            trainer._tr_loss += loss
        trainer._peak = args.peak_flops or peak_flops(args.device, torch.bfloat16 if args.bf16 else torch.float32)
        trainer._clock, trainer._clock_step = time.perf_counter(), state.global_step

    def on_step_end(self, args, state, control, **kwargs):
        state.epoch = float(self.trainer.place["passes"])
        if self.trainer._reduced(float(self.trainer._terminated), "sum"):  # all processes stop after the same step
            self.trainer.interrupted = control.should_save = control.should_training_stop = True
