"""Models of `transformers`: which of ours they can hold, and how weights and keys map onto each other, both ways."""
