"""Recall beside throughput: suites of configurations, trained or loaded, measured and reported as one row each."""
