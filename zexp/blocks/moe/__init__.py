"""e: mixture of experts."""
