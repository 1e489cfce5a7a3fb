"""lit_transdiff: train, sweep and compare TransDiff-type image generators."""

__version__ = "0.1.0"
