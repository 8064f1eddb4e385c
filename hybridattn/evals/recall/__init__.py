"""Multi-query associative recall: how much a mixer can look up in its context."""
