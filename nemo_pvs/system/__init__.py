"""Files, locks, processes, ranks and progress bars: what has nothing to do with models."""
