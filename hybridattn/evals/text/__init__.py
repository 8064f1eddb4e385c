"""Language modelling on real text: held-out bits per byte beside n-gram models."""
