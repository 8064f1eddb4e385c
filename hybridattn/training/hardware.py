"""Peak floating-point rates of devices, the denominator of model FLOPs utilisation (MFU)."""

import time

import torch

# FLOP/s of dense bf16 matrix products, by part of the driver's device name; from NVIDIA's and AMD's data sheets.
PUBLISHED = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Return the peak FLOP/s of one device: published for bf16 on known GPUs, else measured with a 2048 x 2048 product.

    The measured value is the fastest of four runs.
    """
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
        (a @ b)[0, 0].item()  # synchronises with the device
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)
