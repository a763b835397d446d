"""n: a Kolmogorov-Arnold network of two layers as a channel mixer."""
