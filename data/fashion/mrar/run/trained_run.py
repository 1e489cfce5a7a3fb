from lit_transdiff.sampling.pipeline import TrainedRun  # noqa: F401
