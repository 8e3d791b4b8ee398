"""Launch profiles, and runs as NeMo-Run experiments on Slurm."""
