"""Tools for the kernels: correctness and speed on a device, and compilation, memory traffic and tuning."""
