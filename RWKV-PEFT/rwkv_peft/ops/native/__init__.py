"""What the kernels of every family need: instruction levels, compilers, builds, loading, NVRTC and the driver."""
