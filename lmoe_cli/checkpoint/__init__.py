"""Safetensors: headers without torch, tensors by name across shards, and a writer that streams."""
