"""The pruning methods: name, options and how each prunes; the algorithms are in the sibling packages.

Nothing here imports PyTorch before a model is pruned, so that commands and recipes can list every option quickly.
"""
