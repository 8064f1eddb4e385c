"""How fast a model reads and writes, and how much memory it keeps per sequence."""
