"""Speed of the operators."""
