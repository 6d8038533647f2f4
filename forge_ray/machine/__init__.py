"""The machine of a process: hardware, environment, switches, Ray cluster."""
