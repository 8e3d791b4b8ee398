"""Methods that prune during training: Sheared LLaMA, EfficientLLM."""
