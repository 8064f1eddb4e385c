"""Training: text every machine has, byte baselines, and a training loop that a CPU carries."""
