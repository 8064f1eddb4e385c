"""lm-eval's class for models of transformers with two checks: parity gates before scoring, and no truncated prompts.

Importing this module requires lm-eval and registers the class there as ``hybridattn``.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

import hybridattn  # noqa: F401  # registers this package's models with transformers
from hybridattn.evals.lm_eval import parity
from lm_eval.api.instance import Instance
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import normalize_gen_kwargs


class UnsoundError(RuntimeError):
    """A check failed, so that scores would be misleading."""


@register_model("hybridattn")
class CheckedLM(cast(Any, HFLM)):  # lm-eval's decorator hides the class from type checkers
    """`HFLM` for causal language models that must pass the parity gates; truncates no prompt unless allowed.

    Args:
        pretrained: folder or name of the checkpoint.
        allow_truncation: whether prompts may be truncated at their beginning.
        options: arguments of `HFLM`.

    Raises:
        UnsoundError: a gate failed, or, in later calls, a prompt is too long.
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
            raise UnsoundError(f"parity: expected all gates to pass before scoring, got failed: {', '.join(failed)}")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate as `HFLM` does; raise UnsoundError if a prompt would be truncated."""
        self.check_whole(requests)
        return super().generate_until(requests, disable_tqdm)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations as `HFLM` does; raise UnsoundError if a prompt would be truncated."""
        self.check_whole(requests)
        return super().loglikelihood(requests, disable_tqdm)

    def check_whole(self, requests: list[Instance]) -> None:
        """Raise UnsoundError if a prompt would be truncated and this is not allowed."""
        if self.allow_truncation:
            return
        cut = truncated(
            [request.args for request in requests], lambda text: len(self.tok_encode(text)), self.max_length
        )
        if cut:
            raise UnsoundError(
                f"prompts: expected at most max_length={self.max_length} tokens with the tokens to generate, got more "
                f"in {cut} of {len(requests)}; use other --lengths, a larger max_length in --model_args, or "
                "--allow_truncation"
            )

    def get_model_info(self) -> dict[str, Any]:
        """Return `HFLM`'s information, the device and the gates' results."""
        device = torch.device(self.device)
        return {
            **super().get_model_info(),
            "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "parity": {gate: result._asdict() for gate, result in self.parity.items()},
        }


def truncated(requests: Sequence[Sequence[Any]], count: Callable[[str], int], max_length: int) -> int:
    """Count the requests whose prompts `HFLM` would truncate.

    Args:
        requests: pairs of a prompt and its generation options, or of a prompt and its continuation.
        count: function that returns the number of tokens of a text.
        max_length: maximum length of the input in tokens, generated tokens included.
    """
    cut = 0
    for text, rest in requests:
        if isinstance(rest, str):
            cut += count(text + rest) > max_length + 1
        else:
            cut += count(text) > max_length - normalize_gen_kwargs(rest).get("max_gen_toks", 0)
    return cut
