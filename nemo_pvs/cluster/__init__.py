"""Launch profiles, and runs as NeMo-Run experiments, locally or on Slurm."""
