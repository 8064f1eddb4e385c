"""What a device could do at most."""

import time

import torch

# Dense bf16 matrix products, FLOP/s, by the name the driver gives; from NVIDIA's and AMD's data sheets.
PUBLISHED = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one device: published for bf16 on known GPUs, else those of a matrix product of 2048 measured here."""
    if device.type == "cuda" and dtype == torch.bfloat16:
        name = torch.cuda.get_device_name(device)
        for part, rate in PUBLISHED.items():
            if part in name:
                return rate
    size = 2048
    a, b = torch.ones(2, size, size, device=device, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        (a @ b)[0, 0].item()  # waits for the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
