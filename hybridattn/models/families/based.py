"""Configurations of the BASED and JRT models: layers of convolutions, linear attention and small sliding windows."""

from collections.abc import Sequence
from dataclasses import field
from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from ..decoder.configuration import HybridAttnConfig
from ..decoder.mixer_list import Entry

OPTIONS = {
    "conv": {"kernel_size": 3, "expand": 2},
    "taylor": {"num_heads": 16, "key_dim": 16},
    "prefix": {"num_heads": 16, "key_dim": 16},
    "window": {"num_heads": 16, "window": 128},
}


def stack(num_layers: int, name: str, linear: Sequence[int] | None = None) -> list[Entry]:
    """Return the mixers of a stack: linear attention in some layers, a window after each, convolutions elsewhere.

    Args:
        num_layers: number of layers.
        name: mixer of the linear attention layers, ``"taylor"`` or ``"prefix"``.
        linear: indices of the linear attention layers; by default layers 1, 6, 11, .. except the last layer, as in the
            published model of 27 layers.
    """
    linear = range(1, num_layers - 1, 5) if linear is None else linear
    return [name if i in linear else "window" if i - 1 in linear else "conv" for i in range(num_layers)]


@strict
class HybridAttnBasedConfig(HybridAttnConfig):
    """``HybridAttnConfig`` with the defaults of BASED's published model of 360 million parameters.

    Arora et al., "Simple linear attention language models balance the recall-throughput tradeoff" (2024), section 4 and
    appendix; the vocabulary size is GPT-2's, rounded up to a multiple of 8. Given ``mixer_options`` replace the default
    options of all mixers.
    """

    model_type = "based"
    model_classes: ClassVar[str] = "hybridattn.models.families.modeling"

    vocab_size: int = 50264
    hidden_size: int = 1024
    intermediate_size: int | None = 2048
    mixer_options: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: dict(OPTIONS[name]) for name in ("conv", "taylor", "window")}
    )
    rms_norm_eps: float = 1e-5

    @classmethod
    def default_mixers(cls, num_layers: int | None) -> list[Entry]:
        return stack(num_layers or 27, "taylor")


@strict
class HybridAttnJRTConfig(HybridAttnBasedConfig):
    """BASED with bidirectional linear attention over a prefix, the first ``prefix_lengths`` tokens of a sequence.

    Arora et al., "Just read twice: closing the recall gap for recurrent language models" (JRT-RNN, 2024), section 4.
    """

    model_type = "jrt"

    mixer_options: dict[str, dict[str, Any]] = field(
        default_factory=lambda: {name: dict(OPTIONS[name]) for name in ("conv", "prefix", "window")}
    )

    @classmethod
    def default_mixers(cls, num_layers: int | None) -> list[Entry]:
        return stack(num_layers or 27, "prefix")
