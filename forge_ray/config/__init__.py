"""What a run file may say. Imports neither torch nor ray (a test proves it)."""
