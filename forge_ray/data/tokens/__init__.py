"""Records → token ids and loss masks, by the model's own template."""
