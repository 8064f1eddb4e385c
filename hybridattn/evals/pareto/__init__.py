"""Measure recall, memory and speed of the same models: suites of models, and the run that trains and measures them."""
