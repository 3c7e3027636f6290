"""Adapters as they are stored: config, tensor names, summary, soundness, the local store, pulling and writing."""
