"""One training loop per method, each a single function."""
