"""Tokens in, tokens out: the engines behind serving, evaluation and rollouts."""
