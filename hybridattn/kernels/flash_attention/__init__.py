"""Softmax attention, full and sliding window: ``api`` is the public face, ``options`` what can be asked for,
``reference`` the specification, ``blocked`` the torch backend."""

from .api import MOST_NEW_TOKENS, flash_attention, flash_decode
from .options import BlockMask

__all__ = ["MOST_NEW_TOKENS", "BlockMask", "flash_attention", "flash_decode"]
