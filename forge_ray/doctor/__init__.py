"""What `forge doctor` looks at (level 4)."""
