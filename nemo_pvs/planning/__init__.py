"""Plan a recipe before anything runs: what it does, what it costs and whether it can work."""
