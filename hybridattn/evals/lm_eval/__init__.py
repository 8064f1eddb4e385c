"""Recall and language modelling with lm-eval: tasks, the checked model, scores and reports."""
