import torch

from hybridattn.training.hardware import peak_flops


def test_a_cpu_is_measured():
    assert 1e8 < peak_flops(torch.device("cpu"), torch.float32) < 1e15
