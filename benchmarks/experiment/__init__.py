"""Does routing help? One base, one expert per domain, every router, and controls: `python -m benchmarks.experiment`."""
