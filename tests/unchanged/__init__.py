"""What the code of version 0.1 made before its modules moved to new packages, and tests that today's code agrees.

``golden/`` holds what was recorded: the settings and dry runs of the packaged recipes, plans, masks and fingerprints of
small models, a finished run folder and the report of it. ``python -m tests.unchanged.record`` records everything again;
do that only for a change of results that is intended, and say in the commit why. Left out is what depends on the
machine: sums of floating-point numbers (the decisions made from them are here instead), times, versions and paths.
"""
