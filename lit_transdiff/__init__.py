"""lit_transdiff: train, sweep and compare TransDiff-type image generators.

The names of ``PUBLIC`` are imported from here, as in ``from lit_transdiff import load_run, train``. Each is loaded when it is
first used, so that ``import lit_transdiff`` and the command line answer at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_transdiff.config import RunConfig as RunConfig
    from lit_transdiff.data.datamodule import DataModule as DataModule
    from lit_transdiff.data.dataset import Batch as Batch
    from lit_transdiff.distributed import build_fabric as build_fabric
    from lit_transdiff.evaluation.evaluate import evaluate as evaluate
    from lit_transdiff.evaluation.features import load_extractor as load_extractor
    from lit_transdiff.figures import plots as plots
    from lit_transdiff.loading import load_run as load_run
    from lit_transdiff.models.transdiff import TransDiff as TransDiff
    from lit_transdiff.parts import build as build
    from lit_transdiff.pictures import grid as grid
    from lit_transdiff.pipeline import train_and_score as train_and_score
    from lit_transdiff.prepare import cache as cache
    from lit_transdiff.prepare import statistics as statistics
    from lit_transdiff.sampling import load_generator as load_generator
    from lit_transdiff.tracking.compare import compare as compare
    from lit_transdiff.tracking.runs import runs as runs
    from lit_transdiff.trainer import train as train

__version__ = "0.1.0"

# Name -> the module in which it is defined.
PUBLIC = {
    "load_run": "loading",
    "RunConfig": "config",
    "build": "parts",
    "train": "trainer",
    "train_and_score": "pipeline",
    "TransDiff": "models.transdiff",
    "DataModule": "data.datamodule",
    "Batch": "data.dataset",
    "cache": "prepare",
    "statistics": "prepare",
    "load_extractor": "evaluation.features",
    "load_generator": "sampling",
    "evaluate": "evaluation.evaluate",
    "build_fabric": "distributed",
    "runs": "tracking.runs",
    "compare": "tracking.compare",
    "plots": "figures",
    "grid": "pictures",
}
__all__ = [*PUBLIC]


def __getattr__(name: str) -> Any:
    """A public name, loaded now and kept."""
    if name not in PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{PUBLIC[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *PUBLIC})
