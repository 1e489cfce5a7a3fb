from lit_transdiff.sampling.pipeline import TransDiffPipeline  # noqa: F401
