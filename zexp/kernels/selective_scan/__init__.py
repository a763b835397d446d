"""The selective scan, the sequence mixing of Mamba-1."""
