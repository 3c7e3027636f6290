"""A shape for synthetic models that take no time."""

from __future__ import annotations

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 512, "tie_word_embeddings": True}
