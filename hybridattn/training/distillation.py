"""Trainers that distil a softmax model into its hybrid: attention transfer per layer, then distillation of logits."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hybridattn.models.decoder import HybridAttnForCausalLM
from hybridattn.models.linearize import mixer_of, replaced_layers

from .trainer import StreamTrainer


@contextmanager
def taught(student: HybridAttnForCausalLM, teacher: HybridAttnForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Replace the output of every new mixer of the student by the teacher's output, and record the mixer's error.

    In this context all mixers read the teacher's hidden states in one forward pass, and no error propagates to another
    layer.

    Yields:
        A dict that every forward pass fills: layer -> squared error over the squared norm of the teacher's output,
        fp32 [].
    """
    errors: dict[int, Tensor] = {}

    def hook(layer: int) -> Any:
        attention = mixer_of(teacher, layer)

        def compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            with torch.no_grad():
                target = attention(*args, **kwargs)
            errors[layer] = (output - target).float().square().sum() / target.float().square().sum()
            return target

        return compare

    with ExitStack() as stack:
        for layer in replaced_layers(student, teacher):
            handle = mixer_of(student, layer).register_forward_hook(hook(layer), with_kwargs=True)
            stack.callback(handle.remove)
        yield errors


class TransferTrainer(StreamTrainer):
    """Attention transfer: train each new mixer to reproduce the teacher's mixer on the teacher's hidden states.

    The loss is the sum over layers of the relative errors of ``taught``, so that layers with large outputs do not
    dominate. Source: Zhang et al., "LoLCATs" (2024), section 3.

    Args:
        teacher: the softmax model, in the decoder of this library.
        kwargs: arguments of StreamTrainer. The caller must freeze the parameters outside the replaced mixers.
    """

    def __init__(self, *, teacher: HybridAttnForCausalLM, **kwargs):
        super().__init__(**kwargs)
        self.teacher = teacher.eval()
        for layer in replaced_layers(self.accelerator.unwrap_model(self.model), teacher):
            mixer_of(teacher, layer).to(self.args.device, torch.float32)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        student: Any = self.accelerator.unwrap_model(model)
        labels = inputs["labels"]
        inputs = {name: x for name, x in inputs.items() if name != "labels"}
        with taught(student, self.teacher) as errors:
            outputs = model(**inputs, logits_to_keep=1, use_cache=False)
        loss = torch.stack(list(errors.values())).sum()
        if num_items_in_batch is not None:  # weight by this micro-batch's share of the step's tokens
            loss = loss * (labels != -100).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class DistillTrainer(StreamTrainer):
    """Distillation of logits: cross entropy and divergence from the teacher, ``(1 - share) * CE + share * KL``.

    The logits of all tokens of a micro-batch are in memory. Source: Hinton et al., "Distilling the Knowledge in a
    Neural Network" (2015), section 2, at temperature 1.

    Args:
        teacher: a causal language model with the same vocabulary.
        share: weight of the divergence, from 0 to 1.
        kwargs: arguments of StreamTrainer.
    """

    def __init__(self, *, teacher: HybridAttnForCausalLM, share: float = 0.5, **kwargs):
        super().__init__(**kwargs)
        model: Any = teacher
        self.teacher, self.share = model.to(self.args.device, torch.float32).eval(), share

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        predicted = inputs["labels"][:, 1:] != -100
        targets = inputs["labels"][:, 1:][predicted]
        tokens = len(targets) if num_items_in_batch is None else num_items_in_batch
        inputs = {name: x for name, x in inputs.items() if name != "labels"}
        outputs = model(**inputs, use_cache=False)
        with torch.no_grad():
            taught = self.teacher(**inputs, use_cache=False).logits[:, :-1][predicted].float().log_softmax(-1)
        logs = outputs.logits[:, :-1][predicted].float().log_softmax(-1)
        entropy = F.nll_loss(logs, targets, reduction="sum")
        divergence = F.kl_div(logs, taught, log_target=True, reduction="sum")
        loss = ((1 - self.share) * entropy + self.share * divergence) / tokens
        return (loss, outputs) if return_outputs else loss
