"""Sliding-window attention as a module: attention's own, which asks its spec how far it sees."""

from __future__ import annotations

from zexp.blocks.attention.layer import Layer

__all__ = ["Layer"]
