"""``pvs run``: the stages from a parent to a report, each done once and resumable."""
