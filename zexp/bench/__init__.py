"""What this machine does with zexp's parts: blocks, kernels, whole steps and the input pipeline, timed and put beside its ceilings."""
