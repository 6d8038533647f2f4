"""Disk space of a store: what uses it, what must stay, and the removal of the rest."""
