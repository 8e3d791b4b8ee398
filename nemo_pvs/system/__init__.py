"""Files, locks, processes, ranks and progress bars: everything that does not depend on models."""
