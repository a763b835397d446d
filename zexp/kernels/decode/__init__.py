"""What decoding computes for one token more: little arithmetic, and every weight and every cached position read once."""
