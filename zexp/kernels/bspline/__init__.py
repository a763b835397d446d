"""Linear maps of B-splines of their input: the layers of a Kolmogorov-Arnold network."""
