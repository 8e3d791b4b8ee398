"""The Python API, one file a verb; ``import nemo_pvs as pvs`` offers all of it and loads each part when it is used."""
