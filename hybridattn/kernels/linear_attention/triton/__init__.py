"""Triton kernels of linear attention.

``launch`` chooses launch parameters; ``compile_cases`` lists the launches that are compiled and the bytes each may move.
"""
