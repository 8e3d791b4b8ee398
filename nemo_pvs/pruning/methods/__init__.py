"""The pruning methods: what each is called, what it may be asked, and how it prunes; the algorithms are beside it.

Nothing here imports PyTorch before a model is pruned, so that commands and recipes know every option at once.
"""
