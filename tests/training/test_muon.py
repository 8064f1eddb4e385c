import pickle

import pytest
import torch

from hybridattn.training.muon import Muon, orthogonal

SHAPES = [(8, 8), (24, 8), (5, 16), (1, 7)]


def matrices(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in SHAPES]


def test_steps_are_those_of_torch_in_bf16():
    ours, theirs = matrices(0), matrices(0)
    optimizers = [
        Muon(ours, 0.02, weight_decay=0.3, dtype=torch.bfloat16),
        torch.optim.Muon(theirs, 0.02, weight_decay=0.3),
    ]
    for step in range(4):
        for weights in (ours, theirs):
            for weight, gradient in zip(weights, matrices(step + 1), strict=True):
                weight.grad = gradient.detach()
        for optimizer in optimizers:
            optimizer.step()
    for a, b, start in zip(ours, theirs, matrices(0), strict=True):
        assert not torch.equal(a, start)
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_come_near_one_and_directions_stay(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix += 2 * torch.eye(*shape)  # without this, tiny singular values would need more iterations
    found = orthogonal(matrix)
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    turned = left.T @ found @ right.T
    assert turned.diagonal().sub(1).abs().max() < 0.35
    torch.testing.assert_close(turned, turned.diagonal().diag(), rtol=0, atol=1e-9)
    torch.testing.assert_close(orthogonal(1e6 * matrix), found, rtol=1e-9, atol=1e-9)


def test_a_matrix_without_gradient_stays_and_zero_gradients_only_decay():
    still, zero = torch.ones(3, 2, requires_grad=True), torch.ones(3, 2, requires_grad=True)
    zero.grad = torch.zeros(3, 2)
    Muon([still, zero], 0.1, weight_decay=0.5).step()
    assert torch.equal(still, torch.ones(3, 2))
    torch.testing.assert_close(zero.detach(), torch.full((3, 2), 0.95))


def test_vectors_are_refused():
    with pytest.raises(ValueError, match=r"matrices, got one of shape \(3,\)"):
        Muon([torch.ones(3, requires_grad=True)], 0.1)


def test_a_closure_is_refused_and_a_copy_steps():
    weight = torch.ones(3, 2, requires_grad=True)
    weight.grad = torch.ones(3, 2)
    optimizer = Muon([weight], 0.1, dtype=torch.float64)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)  # pyright: ignore[reportArgumentType]
    copy = pickle.loads(pickle.dumps(optimizer))
    copy.param_groups[0]["params"][0].grad = weight.grad
    copy.step()
    optimizer.step()
    assert torch.equal(copy.param_groups[0]["params"][0], weight)
