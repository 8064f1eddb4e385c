"""Developer tools for the kernels: correctness checks, benchmark, compilation, memory traffic, tuning."""
