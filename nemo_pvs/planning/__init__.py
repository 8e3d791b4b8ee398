"""What a recipe would do and cost, and what is wrong with it, before anything runs."""
