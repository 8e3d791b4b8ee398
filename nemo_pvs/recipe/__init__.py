"""A recipe: the YAML file as typed blocks, one module per block."""
