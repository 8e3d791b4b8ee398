"""Calibration: measure a model's statistics on some text once, and prune by them any number of times."""
