"""Where a process runs: hardware, environment, switches, the Ray cluster."""
