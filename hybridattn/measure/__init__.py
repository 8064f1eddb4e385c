"""Helpers of all measurements: timing, a probe of the CPU load, provenance, output files and folders, Markdown."""
