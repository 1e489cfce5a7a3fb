"""Shared code of tests; each module is named after its product.

Test modules import from here, never from each other.
"""
