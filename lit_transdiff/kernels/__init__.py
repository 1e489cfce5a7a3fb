"""Triton kernels for what surrounds the matrix products of a transformer, each with its plain form."""
