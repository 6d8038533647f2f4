"""A model version → a folder or a file that other tools open."""
