"""Rows for the next cycle from the ratings and corrections that an application collected."""
