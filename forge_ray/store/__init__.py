"""Bytes and facts: what is stored, who may write a fact, how it is signed, logged and found."""
