"""HTTP statuses that several modules record."""

from __future__ import annotations

CLIENT_CLOSED = 499  # nginx's status for a client that closed its connection before it had the whole answer
