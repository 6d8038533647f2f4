"""What `forge doctor` looks at."""
