"""The gated delta rule, the sequence mixing of gated DeltaNet."""
