"""Softmax attention, full and sliding window.

``api`` holds the public operators, ``options`` their options, ``reference`` the specification, ``blocked`` the torch
backend, ``triton`` the kernels.
"""

from .api import MOST_NEW_TOKENS, flash_attention, flash_decode
from .options import BlockMask

__all__ = ["MOST_NEW_TOKENS", "BlockMask", "flash_attention", "flash_decode"]
