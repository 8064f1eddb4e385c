"""Triton kernels of softmax attention.

``launch`` chooses launch parameters.
``compile_cases`` lists what is compiled ahead of time, and the bytes that each launch may move.
"""
