"""Plugin of NeMo's own command: verbs, factories and executors."""
