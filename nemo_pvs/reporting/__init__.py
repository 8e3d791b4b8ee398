"""The results and costs of runs, and the report that shows them."""
