"""Compare a hybrid decoder on two and four ranks, also with FSDP2, with one rank; tests/ranks.py runs this file."""

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from hybridattn import (
    HybridAttnConfig,
    HybridAttnForCausalLM,
    gather_sequence,
    sequence_parallel,
    shard_sequence,
)
from hybridattn.evals.speed.memory import peak_bytes

TOKENS, VOCAB = 64, 40
MIXERS = ["conv", "gla", "window", "full", "taylor", "retention", "prefix"]
# Rows, packed rows with ignored targets, and segments of uneven lengths.
CASES: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "packed, zigzag": {"layout": "zigzag", "packed": [0, 5, 16, 17, 60]},
    "packed, uneven": {"tokens": [3, 0, 40, 21], "packed": [0, 5, 16, 17, 60]},
    "no logits, checkpointed, zigzag": {"layout": "zigzag", "options": {"skip_logits": True}, "checkpointing": True},
    "a given number of targets": {"options": {"num_items_in_batch": 50}},
}
TWO_RANKS = ("packed, zigzag",)
TRAFFIC = {
    2: [("contiguous", 64)],
    4: [(layout, tokens) for layout in ("contiguous", "zigzag") for tokens in (64, 128)],
}


def config() -> HybridAttnConfig:
    return HybridAttnConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=32,
        mixers=MIXERS,
        mixer_options={
            "gla": {"num_heads": 2, "conv_size": 3},
            "window": {"num_heads": 2, "window": 7},
            "full": {"num_heads": 4, "num_key_value_heads": 2, "sinks": True},
            "taylor": {"num_heads": 2, "key_dim": 4},
            "prefix": {"num_heads": 2, "key_dim": 4, "tie_prefix": True},
            "retention": {"num_heads": 2},
        },
        input_conv_size=3,
        initializer="fan_in",
    )


def alibi_config() -> HybridAttnConfig:
    options = {"full": {"num_heads": 2, "rope_theta": None, "alibi": True}}
    return HybridAttnConfig(vocab_size=VOCAB, hidden_size=16, mixers=["full"], mixer_options=options)


# FSDP2 pads to the number of ranks, so all sizes are multiples of 4. The larger part of the parameters is the layers in
# one case, and the embeddings and head in the other.
SHARDED = {"layers": 64, "embeddings": 8192}
FEW = 4  # tokens, so that activations take little memory


def sharded_config(vocab_size: int) -> HybridAttnConfig:
    heads = {"num_heads": 4}
    return HybridAttnConfig(
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=256,
        mixers=["gla", "window", "full"],
        mixer_options={"gla": heads, "window": {**heads, "window": 7}, "full": heads},
    )


def model() -> HybridAttnForCausalLM:
    torch.manual_seed(0)
    return HybridAttnForCausalLM(config())


def checkpoint_activations(net: HybridAttnForCausalLM) -> None:
    # transformers 5.17 has the second name only.
    getattr(net, "activation_checkpointing_enable", net.gradient_checkpointing_enable)()
    net.train()


def error(actual: Tensor, expected: Tensor) -> float:
    return (actual - expected).norm().item() / max(expected.norm().item(), 1e-6)


def compare(case: dict[str, Any], group: Any) -> dict[str, float]:
    torch.manual_seed(1)
    offsets = torch.tensor(case["packed"]) if "packed" in case else None
    ids = torch.randint(VOCAB, (2 if offsets is None else 1, TOKENS))
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.3, -100)
    if offsets is not None:
        labels[:, int(offsets[-1]) :] = -100
    options = {"cu_seq_lens_q": offsets, "use_cache": False, **case.get("options", {})}
    net = model()
    if case.get("checkpointing"):
        checkpoint_activations(net)
    expected = net(ids, labels=labels, **options)
    grads = torch.autograd.grad(expected.loss, list(net.parameters()))
    with sequence_parallel(case.get("tokens", TOKENS), group, case.get("layout", "contiguous")):
        out = net(shard_sequence(ids), labels=shard_sequence(labels), **options)
        parts = torch.autograd.grad(out.loss, list(net.parameters()))
        logits = 0.0
        if out.logits is not None:
            end = TOKENS if offsets is None else int(offsets[-1])
            whole = gather_sequence(out.logits)
            logits = error(whole[:, :end], expected.logits[:, :end])
    total = torch.cat([grad.flatten() for grad in parts])
    dist.all_reduce(total, group=group)
    worst = max(map(error, total.split([g.numel() for g in grads]), [g.flatten() for g in grads]))
    return {"loss": error(out.loss, expected.loss), "logits": logits, "gradients": worst}


@torch.no_grad()
def compare_generation() -> dict[str, float]:
    """All ranks read a prompt together; then each decodes alone with its own cache."""
    net = model().eval()
    torch.manual_seed(3)
    ids, more = torch.randint(VOCAB, (2, TOKENS)), torch.randint(VOCAB, (2, 1))
    caches = [DynamicCache(config=net.config) for _ in range(2)]
    net(ids, past_key_values=caches[0])
    with sequence_parallel(TOKENS, None, "zigzag"):
        net(shard_sequence(ids), past_key_values=caches[1])
    expected, actual = (net(more, past_key_values=cache).logits for cache in caches)
    assert caches[1].get_seq_length() == TOKENS + 1
    return {"logits": error(actual, expected)}


def compare_loss_under_fsdp2() -> dict[str, float]:
    """Compare the loss with skip_logits and sharded parameters with one process; every rank has the same rows."""
    alone, net = model(), model()
    for layer in net.model.layers:
        fully_shard(layer)
    fully_shard(net)
    torch.manual_seed(4)
    ids = torch.randint(VOCAB, (1, 33))
    expected = alone(ids, labels=ids).loss
    loss = net(ids, labels=ids, skip_logits=True).loss
    expected.backward()
    loss.backward()
    pairs = zip(net.parameters(), alone.parameters(), strict=True)
    worst = max(error(a.grad.full_tensor(), b.grad) for a, b in pairs)
    return {"loss": error(loss, expected), "gradients": worst}


def compare_fsdp2() -> tuple[dict[str, float], int]:
    """Take two steps of Adam with two sequences on two ranks each, and parameters sharded over all four.

    Returns:
        The errors against one process, and this rank's numbers of elements of parameters, gradients and moments.
    """
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "sp"))
    torch.manual_seed(2)
    batches = torch.randint(VOCAB, (2, 2, 1, TOKENS))  # step, sequence
    alone, net = model().double(), model().double()  # in fp32 Adam would magnify rounding errors
    for layer in net.model.layers:
        fully_shard(layer)
    fully_shard(net)
    optimizers = [torch.optim.Adam(x.parameters(), lr=0.01) for x in (alone, net)]
    errors, kept = {}, 0
    for step, batch in enumerate(batches):
        expected = torch.stack([alone(ids, labels=ids).loss for ids in batch])
        expected.mean().backward()
        ids = batch[mesh["dp"].get_local_rank()]
        with sequence_parallel(TOKENS, mesh["sp"], "zigzag") as context:
            loss = net(shard_sequence(ids), labels=shard_sequence(ids), skip_logits=True).loss
            (loss * context.size).backward()  # FSDP averages over all ranks, but the ranks of a sequence must be summed
        errors[f"loss {step}"] = error(loss, expected[mesh["dp"].get_local_rank()])
        pairs = zip(net.parameters(), alone.parameters(), strict=True)
        errors[f"gradients {step}"] = max(error(a.grad.full_tensor(), b.grad) for a, b in pairs)
        for optimizer in optimizers:
            optimizer.step()
            kept = sum(
                x.to_local().numel()
                for p in net.parameters()
                for x in (p, p.grad, *optimizer.state[p].values())
                if isinstance(x, DTensor)
            )
            optimizer.zero_grad()
    pairs = zip(net.parameters(), alone.parameters(), strict=True)
    errors["weights"] = max(error(a.full_tensor(), b) for a, b in pairs)
    return errors, kept


def count_traffic(ranks: int, group: Any) -> dict[str, list[dict[str, int]]]:
    """Return the bytes sent by a forward pass, and by forward and backward passes, by layout and length."""
    net, counted = model().bfloat16(), {}
    for layout, tokens in TRAFFIC[ranks]:
        ids = torch.randint(VOCAB, (2, tokens))
        with sequence_parallel(tokens, group, layout) as context:
            loss = net(shard_sequence(ids), labels=shard_sequence(ids), use_cache=False).loss
            forward = dict(context.traffic)
            loss.backward()
            counted[f"{ranks} {layout} {tokens}"] = [forward, dict(context.traffic)]
    return counted


def count_alibi() -> dict[str, list[int]]:
    """Return the bytes sent by the forward and the backward pass of full attention with ALiBi, by layout."""
    net, counted = HybridAttnForCausalLM(alibi_config()).bfloat16(), {}
    ids = torch.randint(VOCAB, (2, TOKENS))
    for layout in ("contiguous", "zigzag"):
        with sequence_parallel(TOKENS, None, layout) as context:
            loss = net(shard_sequence(ids), labels=shard_sequence(ids), use_cache=False).loss
            forward = context.traffic["keys"]
            loss.backward()
            counted[layout] = [forward, context.traffic["keys"] - forward]
    return counted


def count_checkpoints() -> int:
    """Return the bytes of the layers' inputs that are still in memory after the forward pass."""
    net, inputs = model().bfloat16(), []
    checkpoint_activations(net)
    for layer in net.model.layers:
        layer.register_forward_pre_hook(lambda _, args: inputs.append(weakref.ref(args[0])))
    ids = torch.randint(VOCAB, (2, TOKENS))
    with sequence_parallel(TOKENS, None, "zigzag"):
        loss = net(shard_sequence(ids), labels=shard_sequence(ids), use_cache=False).loss
        kept = sum(x.nbytes for x in (ref() for ref in inputs) if x is not None)
        loss.backward()
    return kept


class CollectiveBytes(TorchDispatchMode):
    """Counter of the bytes that a rank sends in all-gathers and reduce-scatters."""

    sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            assert func.name() in ("c10d::_allgather_base_", "c10d::_reduce_scatter_base_"), func
            output, source = args[:2]
            self.sent += abs(output.nbytes - source.nbytes)
        return func(*args, **(kwargs or {}))


def count_sharded(vocab_size: int) -> dict[str, int]:
    """Return the bytes that FSDP2 in mixed precision sends per step, and its peak beyond weights and gradients."""
    net = HybridAttnForCausalLM(sharded_config(vocab_size))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for layer in net.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(net, mp_policy=policy)
    ids = torch.randint(VOCAB, (1, FEW))

    def step() -> None:
        net.zero_grad()  # the first step has allocated gradients, so that they do not count
        net(ids, labels=ids, skip_logits=True, use_cache=False).loss.backward()

    step()
    with CollectiveBytes() as collectives:
        step()
    # The minimum of several steps, since gloo's threads sometimes free a buffer late.
    return {"sent": collectives.sent, "peak": min(peak_bytes(step, torch.device("cpu")) or 0 for _ in range(5))}


def results() -> dict[str, Any]:
    """Return this rank's errors by case, and its bytes."""
    found: dict[str, Any] = {"errors": {}, "traffic": {}}
    for ranks, group in ((2, dist.new_group([0, 1])), (4, dist.group.WORLD)):
        if dist.get_rank() < ranks:
            for name in CASES if ranks == 4 else TWO_RANKS:
                found["errors"][f"{name}, {ranks} ranks"] = compare(CASES[name], group)
            found["traffic"] |= count_traffic(ranks, group)
    found["alibi"] = count_alibi()
    found["errors"]["generation"] = compare_generation()
    found["errors"]["fsdp2"], kept = compare_fsdp2()
    found["errors"]["loss under fsdp2"] = compare_loss_under_fsdp2()
    found["memory"] = {"kept": kept, "checkpoints": count_checkpoints()}
    found["sharded"] = {name: count_sharded(vocab_size) for name, vocab_size in SHARDED.items()}
    return found
