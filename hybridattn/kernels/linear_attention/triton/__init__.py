"""Triton kernels of linear attention: ops (``op``, ``decode``), kernels, launch parameters and compile cases.

``launch`` chooses launch parameters. ``compile_cases`` lists the compilations that are checked without a GPU, and the
bytes that each launch may move.
"""
