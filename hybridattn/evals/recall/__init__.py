"""Multi-query associative recall (MQAR): train small models to look up key-value pairs in their context."""
