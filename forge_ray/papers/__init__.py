"""Papers from facts: gathered once from the catalog; each paper is a pure function of them."""
