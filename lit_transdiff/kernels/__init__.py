"""Triton kernels for the operations around the matrix products of a transformer, and for AdamW."""
