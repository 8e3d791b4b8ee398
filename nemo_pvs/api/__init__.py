"""The Python API, one file per verb; ``import nemo_pvs as pvs`` offers all of it and loads each part on first use."""
