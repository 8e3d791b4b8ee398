"""Runs side by side: whether they may be compared, their gaps and curves."""
