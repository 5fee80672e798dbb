"""Triton kernels for one GPU, each beside its reference in torch and checked against it before it is used."""
