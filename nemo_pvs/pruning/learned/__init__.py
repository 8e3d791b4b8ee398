"""Methods that decide while the model trains: Sheared LLaMA, EfficientLLM."""
