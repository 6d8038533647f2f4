"""Documents about a model version: facts are gathered once from the catalog, and each document is a function of them."""
