"""Calibration: what a model does with some text, measured once and pruned from as often as one likes."""
