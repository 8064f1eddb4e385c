"""Measure a model's prefill, decoding and training times, and its memory per sequence."""
