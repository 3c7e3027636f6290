"""Every table of docs/benchmarks.md: python -m benchmarks, on a quiet machine."""
