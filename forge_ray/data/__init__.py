"""Raw rows to a packed, versioned dataset, and from there to batches."""
