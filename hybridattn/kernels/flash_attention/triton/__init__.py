"""Triton kernels of softmax attention: ops (``forward``, ``decode``), kernels, launch parameters and compile cases.

``launch`` chooses launch parameters. ``compile_cases`` lists the compilations that are checked without a GPU.
"""
