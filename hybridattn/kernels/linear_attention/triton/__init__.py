"""Triton kernels of linear attention: ``launch`` says with what they are launched, ``rows`` what they are held to."""
