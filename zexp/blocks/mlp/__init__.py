"""d: the dense MLP, gated or not."""
