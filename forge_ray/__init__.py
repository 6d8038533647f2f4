"""forge_ray: train a company's own language models on its own rows, and serve them, on its own machines."""

__version__ = "0.1.0"
