"""Rows that must go: the plan, its execution, the purge and the certificate."""
