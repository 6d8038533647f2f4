"""Records → packed shards and a manifest: the stages of a build, and what is already done."""
