"""Recipes: YAML files that say what to train; see README.md."""
