"""Measure base, blend and folded blend side by side in one process."""
