"""Tests that need a CUDA GPU; `make check-gpu` runs them, and those of the kernels on the GPU."""
