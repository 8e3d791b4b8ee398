"""``pvs run``: the resumable stages from a parent to a report."""
