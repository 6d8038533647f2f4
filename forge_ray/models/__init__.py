"""Base models: what is judged before a library opens it, and how one becomes a version."""
