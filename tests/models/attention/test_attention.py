"""``attn_implementation="hybridattn"`` compared with transformers' eager attention, on tiny models of transformers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AlignTextConfig,
    AlignTextModel,
    BartConfig,
    BartModel,
    BertConfig,
    BertModel,
    BloomConfig,
    BloomModel,
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
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    StaticCache,
)
from transformers.masking_utils import (
    bidirectional_mask_function,
    create_causal_mask,
    create_chunked_causal_mask,
    create_masks_for_generate,
    create_sliding_window_causal_mask,
)

import hybridattn  # noqa: F401 (registers the implementation)
from hybridattn.models.attention import attention_forward, create_mask

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
    "initializer_range": 0.3,  # large enough for scores to affect the outputs
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
    """The same model twice: with eager attention and with this package's."""
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
def test_a_row_of_nothing_but_padding(models: tuple[PreTrainedModel, PreTrainedModel]):
    ids, mask = tokens(), torch.tensor([[0] * TOKENS, PADDING["inside"][0]])
    expected, actual = (model(ids, attention_mask=mask).logits for model in models)
    close(actual, expected, mask)
    assert actual.isfinite().all()


@torch.no_grad()
@pytest.mark.parametrize("padding", ["none", "left", "inside"])  # on the right, generation would continue padding
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("beams", [1, 3])
def test_generated_tokens(models: tuple[PreTrainedModel, PreTrainedModel], padding: str, cache: str, beams: int):
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
    """By one and by several tokens, within and beyond the window, with padding in cached and in new tokens."""
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


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_assisted_generation(name: str):
    """Rejected candidates shorten the cache."""
    ids = torch.randint(2, VOCAB, (1, 4)).repeat(1, 4)  # repetitions, from which prompt lookup takes candidates
    expected, actual = (
        model.generate(ids, max_new_tokens=12, do_sample=False, prompt_lookup_num_tokens=3)
        for model in pair(MODELS[name])
    )
    assert actual.tolist() == expected.tolist()


@torch.no_grad()
@pytest.mark.parametrize("autocast", [False, True])
def test_16_bit(models: tuple[PreTrainedModel, PreTrainedModel], autocast: bool):
    """Prefill and a step have no larger error, compared with fp32, than eager attention."""
    ids, mask, (eager, ours) = tokens(), torch.tensor(PADDING["inside"]), models
    exact = eager(ids, attention_mask=mask).logits[mask.bool()]
    errors = []
    for model in (eager, ours):
        model = model if autocast else model.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            first = model(ids[:, :-1], attention_mask=mask[:, :-1], use_cache=True)
            last = model(ids[:, -1:], attention_mask=mask, past_key_values=first.past_key_values)
        logits = torch.cat([first.logits, last.logits], 1)[mask.bool()].float()
        errors.append((logits - exact).norm() / exact.norm())
    assert errors[1] < 1.5 * errors[0] < 0.5


PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4, 5, 6, 0, 1]])
OFFSETS = torch.tensor([0, 3, 10, 12], dtype=torch.int32)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("offsets", [False, True])
def test_packed_sequences(models: tuple[PreTrainedModel, PreTrainedModel], use_cache: bool, offsets: bool):
    """Compared with each sequence alone, since eager gpt-oss, for example, ignores positions that restart."""
    ids, (eager, ours) = tokens(1), models
    expected = torch.cat([eager(part).logits for part in ids.split([3, 7, 2], 1)], 1)
    options: dict[str, Any] = {"position_ids": PACKED}
    if offsets:
        options |= {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS, "max_length_q": 7, "max_length_k": 7}
    close(ours(ids, use_cache=use_cache, **options).logits, expected)
    if offsets:  # only offsets separate the sequences, since rotary positions are relative
        del options["position_ids"]
        close(ours(ids, use_cache=use_cache, **options).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [False, True])
def test_rows_packed_each_in_its_own_way(models: tuple[PreTrainedModel, PreTrainedModel], use_cache: bool):
    ids, (eager, ours) = tokens(2), models
    positions = torch.cat([PACKED, torch.arange(TOKENS)[None]])
    logits = ours(ids, position_ids=positions, use_cache=use_cache).logits
    close(logits[:1], torch.cat([eager(part).logits for part in ids[:1].split([3, 7, 2], 1)], 1))
    close(logits[1:], eager(ids[1:]).logits)


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("name", ENCODERS)
def test_encoders(name: str, padding: str):
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    models = pair(ENCODERS[name])
    expected, actual = (model(ids, attention_mask=mask).last_hidden_state for model in models)
    close(actual, expected, mask)


@torch.no_grad()
def test_a_mask_shared_by_different_numbers_of_queries():
    k, v = torch.randn(2, 2, 1, 9, 8)
    real = torch.ones(2, 9, dtype=torch.bool)
    real[0, 7:] = False
    mask = create_mask(2, 4, 9, mask_function=bidirectional_mask_function, attention_mask=real)
    module = nn.Module()
    module.is_causal = False
    for queries in (4, 6, 3):
        q = torch.randn(2, 1, queries, 8)
        o, _ = attention_forward(module, q, k, v, mask)
        expected = F.scaled_dot_product_attention(q, k, v, real[:, None, None]).transpose(1, 2)
        torch.testing.assert_close(o, expected)


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


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients(models: tuple[PreTrainedModel, PreTrainedModel], padding: str, checkpointing: bool):
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    labelled = mask.clone()
    labelled[:, 1:] &= mask[:, :-1]  # the token after padding is predicted from padding
    if checkpointing:
        enable = getattr(models[1], "activation_checkpointing_enable", None) or models[1].gradient_checkpointing_enable
        enable()
    results = []
    for model in models:
        loss = model.train()(ids, attention_mask=mask, labels=ids.masked_fill(labelled == 0, -100)).loss
        results.append(torch.autograd.grad(loss, list(model.parameters())))
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@pytest.fixture
def llama() -> PreTrainedModel:
    return MODELS["llama"](attn_implementation="hybridattn").eval()


def test_dropout_is_refused():
    model = MODELS["llama"](attn_implementation="hybridattn", attention_dropout=0.1)
    model.eval()(tokens())
    with pytest.raises(ValueError, match=r"dropout: expected 0 .* got 0.1"):
        model.train()(tokens())


CAUSAL = torch.ones(TOKENS, TOKENS).tril().bool()


@pytest.mark.parametrize(
    "mask",
    [
        CAUSAL.expand(2, 1, -1, -1),
        torch.zeros(2, 1, TOKENS, TOKENS).masked_fill(~CAUSAL, -torch.inf),
        torch.ones(2, 1, 1, TOKENS, dtype=torch.bool),
        torch.ones(2, 1, 1, TOKENS, dtype=torch.long),
        torch.zeros(2, 1, 1, TOKENS),
        torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.uint8),
        torch.ones(2, 4, 1, TOKENS, dtype=torch.uint8),
        torch.ones(2, TOKENS, TOKENS, dtype=torch.bool),
    ],
    ids=lambda mask: f"{mask.dtype} {list(mask.shape)}",
)
def test_masks_of_the_caller_are_refused(llama: PreTrainedModel, mask: Tensor):
    with pytest.raises(ValueError, match=r"attention_mask: expected (shape )?\[B, T\].*got"):
        llama(tokens(), attention_mask=mask)


def test_a_mask_for_other_keys_is_refused(llama: PreTrainedModel):
    mask = torch.tensor(PADDING["left"])
    with pytest.raises(ValueError, match="attention_mask: expected one entry for each of 11 keys, got 12"):
        llama(tokens(length=11), attention_mask=mask, use_cache=False)


def test_patterns_of_the_caller_are_refused(llama: PreTrainedModel):
    """Models with images use such patterns: bidirectional blocks and prefixes."""
    options = {"config": llama.config, "inputs_embeds": torch.zeros(2, TOKENS, 32), "attention_mask": None}
    assert create_causal_mask(**options, past_key_values=None) is None
    blocks = torch.zeros(2, TOKENS, dtype=torch.long)
    for pattern in (
        {"or_mask_function": lambda b, h, q, k: k < 3},
        {"and_mask_function": lambda b, h, q, k: k > 3},
        {"block_sequence_ids": blocks},
    ):
        with pytest.raises(ValueError, match="mask_function: expected a causal or bidirectional mask"):
            create_causal_mask(**options, past_key_values=None, **pattern)


def test_chunks_are_refused_where_they_cut(llama: PreTrainedModel):
    options = {"inputs_embeds": torch.zeros(2, TOKENS, 32), "attention_mask": None, "past_key_values": None}
    llama.config.attention_chunk_size = TOKENS
    assert create_chunked_causal_mask(config=llama.config, **options) is None
    llama.config.attention_chunk_size = TOKENS - 1
    with pytest.raises(ValueError, match=r"attention_chunk_size: expected at least 12 .* got 11"):
        create_chunked_causal_mask(config=llama.config, **options)


def test_layers_that_do_not_say_whether_they_are_causal_are_refused():
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = AlignTextModel._from_config(AlignTextConfig(vocab_size=VOCAB, **small), attn_implementation="hybridattn")
    model.eval()
    with pytest.raises(ValueError, match="is_causal: expected an argument or an attribute of the layer"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_models_with_attention_of_their_own_are_refused():
    config = BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2)
    model = BloomModel._from_config(config, attn_implementation="hybridattn")
    with pytest.raises(ValueError, match="attn_implementation: expected 'eager' for BloomConfig"):
        model(input_ids=torch.ones(1, 4, dtype=torch.long))


def test_what_other_implementations_offer_is_refused(llama: PreTrainedModel):
    layer, x = llama.model.layers[0].self_attn, torch.randn(1, 4, 3, 8)
    for name in ("position_bias", "cache", "block_table", "indices", "block_indices", "sinks"):
        with pytest.raises(ValueError, match=f"{name}: expected None"):
            attention_forward(layer, x, x, x, None, **{name: x})


@torch.no_grad()
@pytest.mark.parametrize("padding", PADDING)
def test_a_window_that_the_layer_has_and_does_not_pass_on(padding: str):
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    models = pair(
        lambda **o: Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **MIXED, **experts, use_sliding_window=True, **o))
    )
    expected, actual = (model(ids, attention_mask=mask).logits for model in models)
    close(actual, expected, mask)


@pytest.mark.parametrize("padding", [None, "left"])
def test_a_window_that_only_the_mask_knows_is_refused(llama: PreTrainedModel, padding: str | None):
    llama.config.sliding_window = WINDOW
    layer, x = llama.model.layers[0].self_attn, torch.randn(2, 4, TOKENS, 8)
    options = {"config": llama.config, "inputs_embeds": torch.zeros(2, TOKENS, 32), "past_key_values": None}
    padded = None if padding is None else torch.tensor(PADDING[padding])
    mask = create_sliding_window_causal_mask(attention_mask=padded, **options)
    with pytest.raises(ValueError, match="sliding_window: expected the window of the mask, got None"):
        attention_forward(layer, x, x, x, mask)
    llama.config.sliding_window = TOKENS  # as long as the sequence: hides no key
    attention_forward(layer, x, x, x, create_sliding_window_causal_mask(attention_mask=padded, **options))


def test_offsets_beside_padding_are_refused(llama: PreTrainedModel):
    with pytest.raises(ValueError, match="attention_mask: expected no padding and no static cache"):
        llama(tokens(), attention_mask=torch.tensor(PADDING["left"]), cu_seq_lens_q=OFFSETS)


def test_offsets_beside_kept_keys_are_refused(llama: PreTrainedModel):
    cache = llama(tokens(1), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"cu_seq_lens_q: expected None with cached keys, got .* 24 keys"):
        llama(tokens(1), past_key_values=cache, cu_seq_lens_q=OFFSETS)


def test_attention_weights_are_refused_by_transformers(llama: PreTrainedModel):
    with pytest.raises(ValueError, match=r"`output_attentions` attribute is not supported"):
        llama.config.output_attentions = True


def compiled(model: PreTrainedModel) -> Callable[..., Any]:
    torch.compiler.reset()
    return torch.compile(model, fullgraph=True, backend="aot_eager")


# Gemma 2 has windows, full attention and a softcap.
@pytest.mark.slow
@pytest.mark.parametrize(("name", "padding"), [("llama", None), ("gemma2", "everywhere")])
def test_forward_and_backward_are_one_graph(name: str, padding: str | None):
    eager, ours = pair(MODELS[name])
    ids, mask = tokens(), torch.tensor(PADDING[padding or "none"])
    results = []
    for model, run in ((eager, eager), (ours, compiled(ours))):
        logits = run(ids, attention_mask=mask if padding else None, use_cache=False).logits[mask.bool()]
        results.append([logits, *torch.autograd.grad(logits.sin().sum(), list(model.parameters()))])
    for expected, actual in zip(*results, strict=True):
        close(actual, expected)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_oss", "modernbert"])  # the experts of gpt-oss have no compiled backward in 5.17
def test_a_padded_forward_is_one_graph(name: str):
    ids, mask = tokens(), torch.tensor(PADDING["everywhere"])
    eager, ours = pair((MODELS | ENCODERS)[name])
    expected, actual = (model(ids, attention_mask=mask)[0] for model in (eager, compiled(ours)))
    close(actual, expected, mask)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize("use_cache", [False, True])
def test_packed_sequences_in_a_graph_need_offsets(use_cache: bool):
    eager, ours = pair(MODELS["llama"])
    ids, run = tokens(1), compiled(ours)
    expected = torch.cat([eager(part).logits for part in ids.split([3, 7, 2], 1)], 1)
    options = {"cu_seq_lens_q": OFFSETS, "cu_seq_lens_k": OFFSETS}
    close(run(ids, position_ids=PACKED, use_cache=use_cache, **options).logits, expected)
    if use_cache:
        with pytest.raises(RuntimeError, match="position_ids: expected cu_seq_lens_q"):
            run(ids, position_ids=PACKED, use_cache=use_cache)


@torch.no_grad()
@pytest.mark.slow
@pytest.mark.parametrize(("name", "padding", "count"), [("llama", "none", 1), ("gemma2", "everywhere", 2)])
def test_a_step_with_a_static_cache_is_compiled_once(name: str, padding: str, count: int):
    """``generate`` creates the mask before the step, so that its shape does not grow.

    Static windows of transformers count in a Python number, which becomes dynamic when it changes: one more graph.
    """
    models, graphs = pair(MODELS[name]), []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    step = torch.compile(models[1].forward, fullgraph=True, backend=backend)
    ids, mask = tokens(), torch.tensor(PADDING[padding])
    caches = [StaticCache(config=model.config, max_cache_len=TOKENS + 5) for model in models]
    for model, cache in zip(models, caches, strict=True):
        model(ids, attention_mask=mask, past_key_values=cache)
    for _ in range(5):
        new, mask = tokens(length=1), F.pad(mask, (0, 1), value=1)
        position = torch.full((2, 1), mask.shape[1] - 1)
        made = create_masks_for_generate(models[1].config, torch.empty(2, 1, 0), mask, caches[1], position)
        actual = step(new, attention_mask=made, position_ids=position, past_key_values=caches[1]).logits
        expected = models[0](new, attention_mask=mask, position_ids=position, past_key_values=caches[0]).logits
        close(actual, expected)
    assert len(graphs) == count
