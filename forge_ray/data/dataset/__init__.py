"""A dataset version: read, compared, described, searched, ordered and streamed."""
