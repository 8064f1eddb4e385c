"""Softmax attention, full and sliding window: ``api`` is the public face, ``reference`` the specification,
``blocked`` the torch backend."""

from .api import flash_attention, flash_decode

__all__ = ["flash_attention", "flash_decode"]
