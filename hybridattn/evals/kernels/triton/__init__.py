"""What judges Triton kernels without a GPU: the interpreter made exact, its traffic counted, and the compile gate."""
