"""The building blocks of a model: one folder a block, spec.py without torch and layer.py with it."""
