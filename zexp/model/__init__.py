"""A pattern of blocks as a language model."""
