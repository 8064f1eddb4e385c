"""BASED and its variant that reads a prefix both ways: stacks of convolutions, linear attention and small windows."""

from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.configuration import HybridAttnConfig

OPTIONS = {
    "conv": {"kernel_size": 3, "expand": 2},
    "taylor": {"num_heads": 16, "key_dim": 16},
    "prefix": {"num_heads": 16, "key_dim": 16},
    "window": {"num_heads": 16, "window": 128},
}


def stack(layers: int, linear: list[int], name: str) -> list[str]:
    """Mixer ``name`` in the layers ``linear``, a window in each layer after one of these, convolutions elsewhere."""
    return [name if i in linear else "window" if i - 1 in linear else "conv" for i in range(layers)]


@strict
class HybridAttnBasedConfig(HybridAttnConfig):
    """``HybridAttnConfig`` with the defaults of BASED's published model of 360 million parameters.

    Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (2024), section 4 and
    appendix; the vocabulary is GPT-2's, up to a multiple of 8.
    """

    model_type = "based"
    model_classes: ClassVar[str] = "hybridattn.models.families.modeling"

    vocab_size: int = 50264
    hidden_size: int = 1024
    intermediate_size: int | None = 2048
    mixers: str | list[str] | tuple[str, ...] = tuple(stack(27, [1, 6, 11, 16, 21], "taylor"))
    mixer_options: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: dict(OPTIONS[name]) for name in ("conv", "taylor", "window")}
    )
    rms_norm_eps: float = 1e-5


@strict
class HybridAttnJRTConfig(HybridAttnBasedConfig):
    """BASED with linear attention that reads the first ``prefix_lengths`` tokens both ways.

    Arora et al., "Just read twice: closing the recall gap for recurrent language models" (JRT-RNN, 2024), section 4.
    """

    model_type = "jrt"

    mixers: str | list[str] | tuple[str, ...] = tuple(stack(27, [1, 6, 11, 16, 21], "prefix"))
    mixer_options: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: dict(OPTIONS[name]) for name in ("conv", "prefix", "window")}
    )
