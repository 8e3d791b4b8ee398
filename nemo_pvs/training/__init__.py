"""Training jobs, their metrics, launcher and checkpoints. Imports no NeMo: ``nemo_pvs.megatron`` does."""
