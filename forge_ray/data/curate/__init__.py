"""Rules about what of the records is kept."""
