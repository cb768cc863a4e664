"""Builds and loads the kernels of every family: instruction levels, compilers, a cache, NVRTC and the driver."""
