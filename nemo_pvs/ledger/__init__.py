"""What a model cost: tokens read, FLOPs, and budgets on equal terms."""
