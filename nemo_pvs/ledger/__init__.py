"""What a model has cost: tokens read, FLOPs, and budgets at equal terms."""
