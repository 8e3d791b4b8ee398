"""A recipe: the YAML file as typed blocks, one file a block."""
