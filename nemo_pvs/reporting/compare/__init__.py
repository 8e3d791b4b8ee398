"""Runs side by side: whether they are comparable, their gaps and curves."""
