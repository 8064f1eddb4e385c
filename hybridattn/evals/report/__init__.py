"""Reports of measurements: tables, plots, Pareto fronts and comparisons, in Markdown and as a page."""
