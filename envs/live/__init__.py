"""Live engines behind the same workloads, metrics and environments as simulated ones."""
