"""Training: pretraining and fine-tuning from YAML files; byte corpus, baselines and a small loop for the demo."""
