"""From a checkpoint to a version that has a name: candidates, gates, aliases, comparisons."""
