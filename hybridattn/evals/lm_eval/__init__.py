"""Evaluate recall and language modelling with lm-eval: tasks, a model class with checks, scores and reports."""
