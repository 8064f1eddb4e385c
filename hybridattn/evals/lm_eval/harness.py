"""lm-eval's model of transformers with two checks: parity before anything is scored, and whole prompts.

Importing this module registers the model as ``hybridattn`` with lm-eval, which has to be installed.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

import hybridattn  # noqa: F401  # registers our models with transformers
from hybridattn.evals.lm_eval import parity
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs


class UnsoundError(RuntimeError):
    """The figures would not mean what they seem to."""


@register_model("hybridattn")
class CheckedLM(cast(Any, HFLM)):  # lm-eval's decorator hides the class from type checkers
    """`HFLM` of a causal language model that passes the parity gates and, unless allowed, truncates no prompt.

    Args:
        pretrained: folder or name of the checkpoint.
        allow_truncation: whether prompts may lose their beginning.
        options: those of `HFLM`.

    Raises:
        UnsoundError: a gate failed, or later a prompt is too long; the message names them.
    """

    def __init__(self, pretrained: str, *, allow_truncation: bool = False, **options: Any):
        super().__init__(pretrained, backend="causal", **options)
        self.allow_truncation = allow_truncation
        self.parity = parity.check(self.model, max_length=self.max_length)
        failed = [
            f"{gate} (error {result.error:.2g}, tolerance {result.tolerance:.2g})"
            for gate, result in self.parity.items()
            if not result.passed
        ]
        if failed:
            raise UnsoundError(f"parity gates failed, nothing was scored: {', '.join(failed)}")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As `HFLM`, if all prompts are whole."""
        self.check_whole(requests)
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As `HFLM`, if all prompts are whole."""
        self.check_whole(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def check_whole(self, requests: list[Instance]) -> None:
        """Raise unless no prompt is truncated, or that is allowed."""
        if self.allow_truncation:
            return
        cut = truncated(
            [request.args for request in requests], lambda text: len(self.tok_encode(text)), self.max_length
        )
        if cut:
            raise UnsoundError(
                f"{cut} of {len(requests)} prompts are longer than max_length={self.max_length} less the tokens to "
                "generate: choose other --lengths, a larger max_length in --model_args, or --allow_truncation"
            )

    def get_model_info(self) -> dict[str, Any]:
        """As `HFLM`, with the device and the gates' results."""
        device = torch.device(self.device)
        return {
            **super().get_model_info(),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "parity": {gate: result._asdict() for gate, result in self.parity.items()},
        }


def truncated(requests: Sequence[Sequence[Any]], count: Callable[[str], int], max_length: int) -> int:
    """How many requests lose tokens of their prompts, as `HFLM` cuts them.

    Args:
        requests: of each, a prompt and its options of generation, or a prompt and its continuation.
        count: tokens of a text.
        max_length: the longest input, in tokens, which the generated ones are part of.
    """
    cut = 0
    for text, rest in requests:
        if isinstance(rest, str):
            cut += count(text + rest) > max_length + 1
        else:
            cut += count(text) > max_length - normalize_gen_kwargs(rest).get("max_gen_toks", 0)
    return cut
