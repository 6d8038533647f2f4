"""Scores of a model: held-out rows, safety prompts, what its weights give away."""
