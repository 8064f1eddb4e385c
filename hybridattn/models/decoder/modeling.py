"""The decoder's Hugging Face model classes: base model, causal language model and sequence classifier.

No ``from __future__ import annotations`` here: transformers reads the annotations.
"""

from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerationMixin
from transformers.modeling_layers import GenericForSequenceClassification, GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from ...kernels.runtime.checks import reads_values
from ...layers import Mamba2, PrefixLinearAttention, ShortConvolution, SoftmaxAttention
from ...layers.decays import SoftplusDecay
from ...layers.gated_linear_attention import UniformBiasLinear
from ...layers.parallel import current
from ...layers.parallel.context import refuse_if_sharded
from ...layers.parallel.exchange import Sum
from ...layers.slopes import Slopes
from ..unpadding import Packing
from .block import Block
from .cache import check_cache, mixer_caches
from .configuration import HybridAttnConfig
from .loss import next_token_loss, shared_targets


class DecoderLayer(GradientCheckpointingLayer, Block):
    """A block with support for activation checkpointing."""


class HybridAttnPreTrainedModel(PreTrainedModel):
    """Base class of the models: weight initialisation and the flags that transformers reads."""

    config_class = HybridAttnConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True  # excludes assisted decoding: a recurrent state cannot be rolled back
    _can_record_outputs = {"hidden_states": DecoderLayer}

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoModel"):
        """Do nothing: transformers would copy this file into the checkpoint, where its imports fail."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if self.config.initializer == "fan_in":
            if isinstance(module, nn.Linear):
                init.normal_(module.weight, std=module.in_features**-0.5)
            elif isinstance(module, nn.Embedding):
                init.normal_(module.weight, std=module.embedding_dim**-0.5)
        if isinstance(module, ShortConvolution):
            init.normal_(module.weight, std=module.kernel_size**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, UniformBiasLinear):
            low, high = module.bias_range
            init.uniform_(module.bias, low, high)
        elif isinstance(module, SoftplusDecay):
            for parameter, value in module.initial_values():
                init.copy_(parameter, value)
        elif isinstance(module, Mamba2):
            init.ones_(module.D)
            init.ones_(module.norm_weight)
        elif isinstance(module, Slopes):
            init.copy_(module.values, module.fresh())
        elif isinstance(module, SoftmaxAttention) and module.sinks is not None:
            init.zeros_(module.sinks)


class HybridAttnModel(HybridAttnPreTrainedModel):
    """The decoder without a head; it maps token ids to hidden states."""

    def __init__(self, config: HybridAttnConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([DecoderLayer(config, i) for i in range(len(config.layer_mixers))])
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        prefix_lengths: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Compute the hidden states.

        Args:
            input_ids: [B,T]. Pass either these or ``inputs_embeds``.
            attention_mask: [B,T], or [B,past+T] with a cache: 1 for real tokens, 0 for padding. Padding may be anywhere
                in a row, and does not affect the real tokens.
            position_ids: rotary positions [B,T]; by default the index among the row's real tokens. Positions that
                start again within a row require ``cu_seq_lens_q``.
            past_key_values: ``DynamicCache(config=model.config)``, updated in place.
            inputs_embeds: [B,T,hidden_size].
            use_cache: return a cache, also if ``past_key_values`` is None.
            cu_seq_lens_q: offsets [N+1] of sequences packed into one row (B = 1). Tokens past the last offset belong to
                no sequence: mixers add zeros there.
            prefix_lengths: integers [N], the number of real tokens at the start of each sequence that ``prefix`` mixers
                attend to in both directions. With a cache only in the first call. ``generate`` accepts them too.

        Returns:
            Hidden states [B,T,hidden_size], and the cache.

        Raises:
            ValueError: an argument has a wrong shape or value, or the arguments exclude each other.
        """
        if kwargs.get("output_attentions") or self.config.output_attentions:
            raise ValueError("output_attentions: expected False (no mixer forms its attention weights), got True")
        if "cu_seqlens" in kwargs:
            raise ValueError("cu_seqlens: expected the name cu_seq_lens_q, as in transformers, got cu_seqlens")
        if (input_ids is None) == (inputs_embeds is None):
            got = "neither" if input_ids is None else "both"
            raise ValueError(f"input_ids: expected either input_ids or inputs_embeds, got {got}")
        hidden_states: Tensor = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        batch, tokens = hidden_states.shape[:2]
        packing = None
        if attention_mask is not None:
            length = tokens if past_key_values is None else int(past_key_values.get_seq_length()) + tokens
            if attention_mask.shape != (batch, length):
                raise ValueError(
                    f"attention_mask: expected shape [{batch}, {length}], got {list(attention_mask.shape)}"
                )
            if reads_values(attention_mask, False) and bool((attention_mask < 0).any()):
                raise ValueError("attention_mask: expected 1 for real tokens and 0 for padding, got negative values")
            real = attention_mask[:, length - tokens :].bool()
            if torch.compiler.is_compiling() or not bool(real.all()):
                refuse_if_sharded("attention_mask: expected no padding (pack the rows, cu_seq_lens_q), got zeros")
                packing = Packing.of(real)
        if packing is not None and cu_seq_lens_q is not None:
            raise ValueError("attention_mask: expected no padding with cu_seq_lens_q, got zeros")
        if position_ids is not None and position_ids.shape not in ((batch, tokens), (1, tokens)):
            raise ValueError(f"position_ids: expected shape [{batch}, {tokens}], got {list(position_ids.shape)}")
        if position_ids is not None and cu_seq_lens_q is None:
            _check_positions(position_ids, None if packing is None else real)
        if packing is not None and position_ids is not None:
            position_ids = packing.pack(position_ids.expand(batch, tokens))
        reads_prefix = any(isinstance(layer.mixer, PrefixLinearAttention) for layer in self.layers)
        if prefix_lengths is not None and not reads_prefix:
            raise ValueError(
                f"prefix_lengths: expected None without a 'prefix' mixer in {self.config.mixers}, got a tensor"
            )
        if past_key_values is not None:
            check_cache(past_key_values, len(self.layers))
        for layer in self.layers:
            hidden_states = layer(
                hidden_states,
                position_ids=position_ids,
                packing=packing,
                cu_seqlens=cu_seq_lens_q,
                past_key_values=past_key_values,
                prefix_lengths=prefix_lengths,
            )
        if past_key_values is not None:
            context = current()  # under sequence_parallel, every rank's cache holds the whole sequence
            for kept in mixer_caches(past_key_values):
                kept.advance(tokens if context is None else context.tokens)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def _check_positions(position_ids: Tensor, real: Tensor | None) -> None:
    """Check that the positions of a row's real tokens do not start again; skipped for single tokens and in graphs."""
    if position_ids.shape[-1] < 2 or torch.compiler.is_compiling():
        return
    seen = position_ids if real is None else position_ids.expand_as(real).masked_fill(~real, -1)
    again = seen < seen.cummax(-1).values
    if bool((again if real is None else again & real).any()):
        raise ValueError(
            "position_ids: expected ascending positions without cu_seq_lens_q, got a row that starts again"
        )


def _check_labels(
    labels: Tensor, hidden_states: Tensor, logits_to_keep: int | Tensor, cu_seqlens: Tensor | None
) -> None:
    if labels.shape != hidden_states.shape[:2]:
        raise ValueError(f"labels: expected shape {list(hidden_states.shape[:2])}, got {list(labels.shape)}")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels: expected int64, got {labels.dtype}")
    if cu_seqlens is not None and reads_values(labels, False) and bool((labels[:, int(cu_seqlens[-1]) :] >= 0).any()):
        raise ValueError(
            f"labels: expected -100 for tokens past the last of the offsets {cu_seqlens.tolist()}, got others"
        )
    if not isinstance(logits_to_keep, int) or logits_to_keep:
        raise ValueError(f"logits_to_keep: expected 0 with labels (the loss needs all logits), got {logits_to_keep}")


class HybridAttnForCausalLM(HybridAttnPreTrainedModel, GenerationMixin):
    """The decoder with a causal language-model head."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}  # pyright: ignore[reportAssignmentType]
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: HybridAttnConfig):
        super().__init__(config)
        self.model: HybridAttnModel = AutoModel.from_config(config)  # the class of the configuration's family
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @staticmethod
    def create_masks_for_generate(config, inputs_embeds, attention_mask, past_key_values, **kwargs) -> Tensor | None:
        """Return the 2D mask unchanged; ``generate`` calls this if its cache can be compiled."""
        return attention_mask

    def prepare_inputs_for_generation(self, input_ids, is_first_iteration: bool | None = False, **kwargs):
        """Return the inputs of the next call, without a mask in decoding steps.

        A generated token is never padding, so steps need no mask. To read one would synchronise the GPU.
        """
        inputs = super().prepare_inputs_for_generation(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and inputs["input_ids"].shape[1] == 1 and kwargs.get("use_cache"):
            inputs.pop("attention_mask", None)
        return inputs

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        prefix_lengths: torch.Tensor | None = None,  # generate rejects arguments that are not in this signature
        skip_logits: bool = False,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Compute the logits and, with labels, the next-token loss.

        Under ``sequence_parallel`` every rank returns the loss of the whole sequence, and the caller sums the gradients
        over the ranks. ``logits_to_keep`` counts the rank's tokens. A call with labels returns no cache by default.

        Args:
            labels: int64 [B,T]; -100 is ignored.
            logits_to_keep: number of last tokens whose logits are returned, 0 for all; or a tensor of their positions.
            skip_logits: return only the loss, computed in chunks, so that memory never holds the logits of all tokens.
                Requires labels.
            **kwargs: other arguments of ``HybridAttnModel.forward``, and of the loss: ``num_items_in_batch`` and
                ``shift_labels`` (see ``next_token_loss``).

        Returns:
            Logits [B,T,vocab_size] (None with ``skip_logits``), the loss, and the cache.

        Raises:
            ValueError: an argument has a wrong shape or value, or the arguments exclude each other.
        """
        if skip_logits and labels is None:
            raise ValueError("skip_logits: expected False without labels, got True")
        context = current()
        if use_cache is None and labels is not None and context is not None:
            use_cache = False  # a cache would gather the keys of all ranks on every rank
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            prefix_lengths=prefix_lengths,
            **kwargs,
        )
        if labels is not None and context is None:
            _check_labels(labels, outputs.last_hidden_state, logits_to_keep, kwargs.get("cu_seq_lens_q"))
        elif labels is not None and context is not None:
            kwargs |= shared_targets(labels, kwargs.get("num_items_in_batch"), kwargs.get("shift_labels"), context)
        if skip_logits and labels is not None:
            given = {name: kwargs.get(name) for name in ("num_items_in_batch", "shift_labels")}
            loss: Any = next_token_loss(outputs.last_hidden_state, self.lm_head.weight, labels, **given)
            loss = loss if context is None else Sum.apply(loss, context)
            return CausalLMOutputWithPast(
                loss=loss, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
            )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
            loss = loss if context is None else Sum.apply(loss, context)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=outputs.past_key_values, hidden_states=outputs.hidden_states
        )

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], *args, **kwargs):
        """Remove ``prefix_lengths`` after the first step with a cache, since the cache then contains the prefix."""
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)
        if model_kwargs.get("past_key_values") is not None:
            model_kwargs.pop("prefix_lengths", None)
        return model_kwargs


class HybridAttnForSequenceClassification(GenericForSequenceClassification, HybridAttnPreTrainedModel):
    """The decoder with a classifier on the last token of every row that differs from ``config.pad_token_id``."""

    @wraps(GenericForSequenceClassification.forward)  # transformers reads the signature
    def forward(self, *args, **kwargs):
        refuse_if_sharded(
            "HybridAttnForSequenceClassification: expected no sequence parallelism (one rank has the last token), "
            "got a call"
        )
        return super().forward(*args, **kwargs)


AutoModel.register(HybridAttnConfig, HybridAttnModel, exist_ok=True)
AutoModelForCausalLM.register(HybridAttnConfig, HybridAttnForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(HybridAttnConfig, HybridAttnForSequenceClassification, exist_ok=True)
