"""Train a small language model on text and compare its held-out bits per byte with n-gram models."""
