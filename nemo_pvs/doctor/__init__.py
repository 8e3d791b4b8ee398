"""``pvs doctor``: whether this machine and its packages can train, and how to fix what is wrong."""
