"""What the package adds to NeMo's own command: verbs, factories, executors."""
