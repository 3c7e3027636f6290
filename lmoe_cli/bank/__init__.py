"""What experts do to a base: deltas, read and converted, and the modules that blend them while the base runs."""
