"""``pvs doctor``: whether this machine and its packages can train, and what cures what is wrong."""
