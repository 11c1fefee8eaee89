"""Triton kernels, one operation a file, each beside its reference in plain torch."""
