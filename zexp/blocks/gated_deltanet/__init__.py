"""l: gated DeltaNet, the linear mixer of Qwen3-Next and OLMo-Hybrid."""
