"""Trainers in which a softmax model teaches its hybrid: layer by layer, then by its predictions."""

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
    """Within, every replaced mixer of the student hands on what the teacher's gives, and its own error is kept.

    So all mixers see the teacher's hidden states, in one pass, and no error reaches another layer.

    Yields:
        Of the last forward pass, layer -> squared error over the squared norm of the teacher's output, fp32 [].
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
    """Attention transfer: each replaced mixer alone learns the output of the teacher's, on the teacher's hidden states.

    Zhang et al., "LoLCATs" (2024), section 3. The loss is the sum over layers of ``taught``'s errors, so that layers
    with large outputs do not outweigh others.

    Args:
        teacher: the softmax model, in the decoder of this library.
        Other arguments as of StreamTrainer; parameters outside the replaced mixers are to be frozen.
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
        if num_items_in_batch is not None:  # this micro-batch's share of the step
            loss = loss * (labels != -100).sum() / num_items_in_batch
        return (loss, outputs) if return_outputs else loss


class DistillTrainer(StreamTrainer):
    """The language-model loss, and the divergence from the teacher's predictions: ``(1 - share) * CE + share * KL``.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), section 2, at temperature 1. Logits of all
    tokens of a micro-batch are in memory.

    Args:
        teacher: a causal language model over the same tokens.
        share: of the divergence, from 0 to 1.
        Other arguments as of StreamTrainer.
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
