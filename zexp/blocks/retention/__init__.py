"""t: multi-scale retention, the sequence mixer of RetNet."""
