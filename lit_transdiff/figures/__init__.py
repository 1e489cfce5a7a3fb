"""Figures of runs and their comparisons."""

from lit_transdiff.figures import plots as plots
