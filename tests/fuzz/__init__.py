"""A fuzz with seeds: damaged inputs of every kind are refused in a sentence, or read; all else is a fault of ours.

``python -m tests.fuzz`` says how to run more cases than the suite does, or a single one again.
"""
