"""The losses of attention transfer and of distillation."""

from typing import Any

import pytest
import torch

from hybridattn.models.decoder import HybridAttnConfig, HybridAttnForCausalLM
from hybridattn.models.linearize import mixer_of, swap
from hybridattn.training.distillation import DistillTrainer, TransferTrainer, taught

IDS = torch.randint(40, (1, 30), generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 12, 30])
LABELS = IDS.clone()
LABELS[0, OFFSETS[:-1]] = -100
ROW: dict[str, Any] = {
    "input_ids": IDS,
    "cu_seq_lens_q": OFFSETS,
    "position_ids": torch.cat([torch.arange(12), torch.arange(18)])[None],
}


@pytest.fixture
def teacher() -> HybridAttnForCausalLM:
    torch.manual_seed(0)
    options = {"num_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "rope_theta": 100.0}
    config = HybridAttnConfig(
        vocab_size=40, hidden_size=32, mixers=["full"] * 3, mixer_options={"full": options}, initializer="fan_in"
    )
    return HybridAttnForCausalLM(config).eval()


@pytest.fixture
def student(teacher: HybridAttnForCausalLM) -> HybridAttnForCausalLM:
    """A student in which only the new mixers are trained."""
    student = swap(teacher, ["gla", "full", "gla"]).eval().requires_grad_(False)
    for layer in (0, 2):
        mixer_of(student, layer).requires_grad_(True)
    return student


def made(kind: type, **attributes: Any) -> Any:
    """Create a trainer with only the attributes that its loss reads."""
    trainer = object.__new__(kind)
    trainer.__dict__.update(attributes)
    return trainer


def test_every_new_mixer_sees_the_teachers_hidden_states_and_learns_alone(teacher, student):
    with taught(student, teacher) as errors:
        logits = student(**ROW, use_cache=False).logits
    torch.testing.assert_close(logits, teacher(**ROW, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    assert list(errors) == [0, 2]
    hidden = teacher.model(**ROW, use_cache=False, output_hidden_states=True).hidden_states[2]
    normed = teacher.model.layers[2].input_layernorm(hidden)
    options = {"cu_seqlens": OFFSETS, "position_ids": ROW["position_ids"]}
    target, output = mixer_of(teacher, 2)(normed, **options), mixer_of(student, 2)(normed, **options)
    expected = (output - target).square().sum() / target.square().sum()
    torch.testing.assert_close(errors[2], expected, rtol=1e-4, atol=1e-6)
    errors[2].backward()
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert reached == {name for name, _ in student.named_parameters() if name.startswith("model.layers.2.mixer.")}
    with torch.no_grad():
        assert not torch.allclose(student(**ROW).logits, logits)  # the hooks are removed


def test_transfer_weighs_micro_batches_by_their_tokens(teacher, student):
    trainer = made(TransferTrainer, teacher=teacher, accelerator=made(_Accelerator))
    whole = trainer.compute_loss(student, {**ROW, "labels": LABELS})
    part = trainer.compute_loss(student, {**ROW, "labels": LABELS}, num_items_in_batch=torch.tensor(112))
    torch.testing.assert_close(part, whole * 28 / 112)


class _Accelerator:
    def unwrap_model(self, model: Any) -> Any:
        return model


@pytest.mark.parametrize("count", [None, torch.tensor(56)])
def test_distillation_is_a_mixture_of_two_losses(teacher, student, count):
    def loss(share: float, model: HybridAttnForCausalLM) -> torch.Tensor:
        trainer = made(DistillTrainer, teacher=teacher, share=share)
        return trainer.compute_loss(model, {**ROW, "labels": LABELS}, num_items_in_batch=count)

    half = 1 if count is None else 0.5
    torch.testing.assert_close(loss(0.0, student), student(**ROW, labels=LABELS).loss * half)
    torch.testing.assert_close(loss(1.0, teacher), torch.tensor(0.0), rtol=0, atol=1e-6)
    said, learned = (
        model(**ROW).logits[LABELS.roll(-1) != -100].log_softmax(-1).double() for model in (teacher, student)
    )
    divergence = (said.exp() * (said - learned)).sum(-1).mean()
    assert divergence > 1e-3
    torch.testing.assert_close(loss(1.0, student).double(), divergence * half, rtol=1e-4, atol=0)
    torch.testing.assert_close(loss(0.25, student), 0.75 * loss(0.0, student) + 0.25 * loss(1.0, student))
