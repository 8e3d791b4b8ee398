"""The search for an architecture within a budget."""
