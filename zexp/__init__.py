"""zexp: ablation studies of small hybrid language models."""

__version__ = "0.1.0"
