"""A model version behind an OpenAI-compatible endpoint on Ray Serve."""
