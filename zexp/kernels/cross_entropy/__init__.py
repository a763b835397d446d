"""Loss of a linear head without its logits."""
