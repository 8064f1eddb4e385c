"""Triton kernels of softmax attention: ``launch`` says with what they are launched, ``rows`` what they are held to."""
