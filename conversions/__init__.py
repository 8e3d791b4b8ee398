"""Weight tables, one YAML file per model family; README.md explains the columns."""
