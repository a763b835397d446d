"""Kernels for CPUs in C++: what surrounds matrix products, in one pass over memory each. The products are torch's."""
