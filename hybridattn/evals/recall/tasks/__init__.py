"""Recall tasks for lm-eval: YAML files and the generators that they name. The folder is lm-eval's ``include_path``."""
