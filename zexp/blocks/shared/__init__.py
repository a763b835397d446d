"""g: the Zamba shared transformer block, which feeds the input of the layer it is written with."""
