"""From a dataset and a base model to a checkpoint and an export."""
