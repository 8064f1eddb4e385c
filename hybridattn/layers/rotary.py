"""Rotary position embeddings."""

import torch
from torch import Tensor


def apply_rotary(x: Tensor, position_ids: Tensor, theta: float) -> Tensor:
    """Rotate x [B,T,H,D] by its positions [B,T] or [1,T], the halves of D being the two coordinates (as Llama does).

    Su et al., "RoFormer" (2021), section 3.2.2. Angles are computed in fp32.
    """
    half = x.shape[-1] // 2
    frequencies = theta ** (-torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angles = (position_ids[..., None].float() * frequencies)[:, :, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)
