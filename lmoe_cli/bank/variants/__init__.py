"""One file per kind of adapter content: stored tensors in, a `Delta` out, with the paper it follows."""
