"""What a run cost, what came out of it, and the report that shows both."""
