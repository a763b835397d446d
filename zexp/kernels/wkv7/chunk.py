"""Positions that the chunked form takes at once. Torch-free: formulas count with it.

32: with heads of 64 the products inside a chunk and those with the state cost about the same, and the sequence is
walked in few steps. Its numerical limit is in torch_backend.py.
"""

CHUNK = 32
