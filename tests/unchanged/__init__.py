"""What the code made before its modules moved to packages of their own, and tests that today's code makes the same.

``golden/`` holds what was recorded: settings and dry runs of the packaged recipes, plans, masks and fingerprints of
small models, a finished run folder and its report. ``python -m tests.unchanged.record`` records all of it again; do
that only for a change of results that is intended, and say why in the commit. Whatever depends on the machine is left
out: sums of floating-point numbers (the decisions made from them are here instead), times, versions and paths.
"""
