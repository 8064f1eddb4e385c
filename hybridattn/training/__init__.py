"""Pretraining and fine-tuning from YAML files; also the byte corpus, n-gram baselines and small loop of the demo."""
