"""Code shared by all operators: argument checks, choice of a backend, packed sequences, registration of ops."""
