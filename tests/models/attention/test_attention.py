"""``attn_implementation="hybridattn"`` against transformers' eager attention, on tiny models of its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    ModernBertConfig,
    ModernBertModel,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)

import hybridattn  # noqa: F401 (registers the implementation)

VOCAB, TOKENS, WINDOW = 40, 12, 5
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # scores that matter
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": lambda **o: LlamaForCausalLM(LlamaConfig(**SIZES, **o)),
    "mistral": lambda **o: MistralForCausalLM(MistralConfig(**SIZES, sliding_window=WINDOW, **o)),
    "qwen3": lambda **o: Qwen3ForCausalLM(Qwen3Config(**SIZES, **MIXED, use_sliding_window=True, **o)),
    "gemma2": lambda **o: Gemma2ForCausalLM(
        Gemma2Config(**SIZES, **MIXED, attn_logit_softcapping=2.0, query_pre_attn_scalar=4, **o)
    ),
    "gpt_oss": lambda **o: GptOssForCausalLM(
        GptOssConfig(**SIZES, **MIXED, num_local_experts=2, num_experts_per_tok=1, rope_parameters=None, **o)
    ),
}
ENCODERS: dict[str, Callable[..., PreTrainedModel]] = {
    "bert": lambda **o: BertModel(BertConfig(**SIZES, **o)),
    "modernbert": lambda **o: ModernBertModel(
        ModernBertConfig(**SIZES, local_attention=6, global_attn_every_n_layers=2, initializer_cutoff_factor=9.0, **o)
    ),
}
PADDING = {
    "none": [[1] * 12, [1] * 12],
    "left": [[0] * 4 + [1] * 8, [1] * 12],
    "right": [[1] * 12, [1] * 7 + [0] * 5],
    "inside": [[1, 1, 1, 0, 0, 1, 1, 0, 1, 1, 1, 1], [1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 0, 1]],
    "everywhere": [[0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0]],
}


def pair(build: Callable[..., PreTrainedModel], **options: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The same model twice: eager, ours."""
    eager, ours = (build(attn_implementation=name, **options).eval() for name in ("eager", "hybridattn"))
    ours.load_state_dict(eager.state_dict())
    return eager, ours


@pytest.fixture(params=MODELS)
def models(request: pytest.FixtureRequest) -> tuple[PreTrainedModel, PreTrainedModel]:
    return pair(MODELS[request.param])


def tokens(batch: int = 2, length: int = TOKENS) -> Tensor:
    return torch.randint(2, VOCAB, (batch, length))


def close(actual: Tensor, expected: Tensor, mask: Tensor | None = None) -> None:
    if mask is not None:
        actual, expected = actual[mask.bool()], expected[mask.bool()]
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDING)
def test_logits(models: tuple[PreTrainedModel, PreTrainedModel], padding: str):
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    expected, actual = (model(ids, attention_mask=mask).logits for model in models)
    close(actual, expected, mask)
    if padding == "none":
        close(models[1](ids).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "inside"])  # elsewhere it would go on from padding
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(
    models: tuple[PreTrainedModel, PreTrainedModel], padding: str, cache: str, beams: int
):
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    options = {"max_new_tokens": 8, "do_sample": False, "num_beams": beams, "cache_implementation": cache}
    expected, actual = (
        model.generate(ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options)
        for model in models
    )
    assert actual.sequences.tolist() == expected.sequences.tolist()
    for a, b in zip(actual.logits, expected.logits, strict=True):
        close(a, b)


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=TOKENS + 30),
}


@torch.no_grad()
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("lengths", [(12, 1, 1, 3), (2, 4, 1, 6, 18, 1), (18, 1)])
@pytest.mark.parametrize("padding", [False, True])
def test_a_cache_continued(
    models: tuple[PreTrainedModel, PreTrainedModel], cache: str, lengths: tuple[int, ...], padding: bool
):
    """By one token and by several, beyond the window and not, with padding in what is kept and in what is new."""
    ids = tokens(3, sum(lengths))
    mask = torch.ones_like(ids)
    if padding:
        mask[0, : lengths[0] - 1], mask[1, 1], mask[1, -lengths[-1] - 2 : -1] = 0, 0, 0
    caches, done = [CACHES[cache](model) for model in models], 0
    for n in lengths:
        new, real = ids[:, done : done + n], mask[:, : done + n]
        expected, actual = (
            model(new, attention_mask=real if padding else None, past_key_values=c).logits
            for model, c in zip(models, caches, strict=True)
        )
        close(actual, expected, mask[:, done : done + n])
        done += n


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 1]])
OFFSETS = torch.tensor([0, 3, 10, 12], dtype=torch.int32)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences(models: tuple[PreTrainedModel, PreTrainedModel], use_cache: bool):
    ids, (eager, ours) = tokens(1), models
    expected = eager(ids, position_ids=PACKED, use_cache=False).logits
    close(ours(ids, position_ids=PACKED, use_cache=use_cache).logits, expected)
    offsets = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 7, "max_length_k": 7}
    close(ours(ids, position_ids=PACKED, use_cache=use_cache, **offsets).logits, expected)
    alone = torch.cat([eager(part).logits for part in ids.split([3, 7, 2], 1)], 1)
    close(expected, alone)


@torch.no_grad()
def test_rows_packed_each_in_its_own_way(models: tuple[PreTrainedModel, PreTrainedModel]):
    ids, positions = tokens(2), torch.cat([PACKED, torch.arange(TOKENS)[None]])
    expected, actual = (model(ids, position_ids=positions, use_cache=False).logits for model in models)
    close(actual, expected)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, padding: str):
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    models = pair(ENCODERS[name])
    expected, actual = (model(ids, attention_mask=mask).last_hidden_state for model in models)
    close(actual, expected, mask)


@torch.no_grad()
def test_a_decoder_made_bidirectional(models: tuple[PreTrainedModel, PreTrainedModel]):
    ids, mask = tokens(), torch.tensor(PADDING["left"])
    expected, actual = (model(ids, attention_mask=mask, is_causal=False).logits for model in models)
    close(actual, expected, mask)


@torch.no_grad()
@pytest.mark.parametrize("length", [5, TOKENS, 19])
@pytest.mark.parametrize("padding", PADDING)
def test_cross_attention(padding: str, length: int):
    sizes = {"d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "encoder_layers": 2, "decoder_layers": 2}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    models = pair(lambda **o: BartModel(BartConfig(vocab_size=VOCAB, init_std=0.3, **sizes, **heads, **o)))
    ids, mask, decoder_ids = tokens(), torch.tensor(PADDING[padding]), tokens(length=length)
    expected, actual = (
        model(ids, attention_mask=mask, decoder_input_ids=decoder_ids).last_hidden_state for model in models
    )
    close(actual, expected)
