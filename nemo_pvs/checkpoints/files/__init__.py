"""Files of tensors, read one tensor at a time: safetensors, torch_dist shards, pytorch_model.bin."""
