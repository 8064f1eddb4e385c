"""The one decoder: configuration, model, cache. A family is a set of defaults over it."""

from .configuration import HybridAttnConfig
from .modeling import HybridAttnForCausalLM, HybridAttnModel

__all__ = ["HybridAttnConfig", "HybridAttnForCausalLM", "HybridAttnModel"]
