"""Triton kernels of linear attention: ``launch`` says with what they are launched, ``compile_cases`` which launches are compiled and how many bytes each may move."""
