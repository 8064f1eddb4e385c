"""Reports: what was measured, where, with what, and one picture of it."""
