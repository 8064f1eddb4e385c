"""What every operator shares: argument checks, the choice of a backend, packed sequences."""
