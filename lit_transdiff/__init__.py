"""lit_transdiff: train, sweep and compare TransDiff-type image generators.

The names in ``PUBLIC`` are imported from here, as in ``from lit_transdiff import load_run, train``. Each is
loaded on first use, so that ``import lit_transdiff`` and the command line start quickly.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lit_transdiff.checkpoints.averages import Averaging as Averaging
    from lit_transdiff.cli.pipeline import train_and_score as train_and_score
    from lit_transdiff.config import Family as Family
    from lit_transdiff.config import ModelSettings as ModelSettings
    from lit_transdiff.config import RunConfig as RunConfig
    from lit_transdiff.config.loading import load_run as load_run
    from lit_transdiff.config.paradigms import PARADIGMS as PARADIGMS
    from lit_transdiff.data.datamodule import DataModule as DataModule
    from lit_transdiff.data.dataset import Batch as Batch
    from lit_transdiff.distributed import build_fabric as build_fabric
    from lit_transdiff.distributed.strategies import STRATEGIES as STRATEGIES
    from lit_transdiff.distributed.strategies import StrategyKind as StrategyKind
    from lit_transdiff.evaluation.evaluate import evaluate as evaluate
    from lit_transdiff.evaluation.extractor import FeatureExtractor as FeatureExtractor
    from lit_transdiff.evaluation.extractor import Features as Features
    from lit_transdiff.evaluation.features import EXTRACTORS as EXTRACTORS
    from lit_transdiff.evaluation.features import load_extractor as load_extractor
    from lit_transdiff.evaluation.metrics import METRICS as METRICS
    from lit_transdiff.evaluation.metrics import Metric as Metric
    from lit_transdiff.evaluation.prepare import cache as cache
    from lit_transdiff.evaluation.prepare import statistics as statistics
    from lit_transdiff.flow.guidance import GUIDANCE as GUIDANCE
    from lit_transdiff.flow.guidance import PART_GUIDANCE as PART_GUIDANCE
    from lit_transdiff.flow.loss import DENSITIES as DENSITIES
    from lit_transdiff.flow.loss import LOSS_TERMS as LOSS_TERMS
    from lit_transdiff.flow.loss import OBJECTIVES as OBJECTIVES
    from lit_transdiff.flow.loss import Prediction as Prediction
    from lit_transdiff.flow.process import Process as Process
    from lit_transdiff.flow.processes import PROCESSES as PROCESSES
    from lit_transdiff.flow.solvers import GRIDS as GRIDS
    from lit_transdiff.flow.solvers import SOLVERS as SOLVERS
    from lit_transdiff.models.autoencoder import AUTOENCODERS as AUTOENCODERS
    from lit_transdiff.models.autoencoder import AutoencoderKind as AutoencoderKind
    from lit_transdiff.models.conditions import CONDITIONS as CONDITIONS
    from lit_transdiff.models.decoder import DiffusionDecoder as DiffusionDecoder
    from lit_transdiff.models.decoders import DECODERS as DECODERS
    from lit_transdiff.models.encoder import ENCODERS as ENCODERS
    from lit_transdiff.models.encoder import ARTransformer as ARTransformer
    from lit_transdiff.models.paradigm import Paradigm as Paradigm
    from lit_transdiff.models.paradigm import Problem as Problem
    from lit_transdiff.models.paradigm import Stack as Stack
    from lit_transdiff.models.paradigm import in_one_pass as in_one_pass
    from lit_transdiff.models.paradigm import times_of_rows as times_of_rows
    from lit_transdiff.models.transdiff import TransDiff as TransDiff
    from lit_transdiff.publish.push import push as push
    from lit_transdiff.sampling.generator import load_generator as load_generator
    from lit_transdiff.sampling.pictures import grid as grid
    from lit_transdiff.sampling.pipeline import TransDiffPipeline as TransDiffPipeline
    from lit_transdiff.stages import STAGES as STAGES
    from lit_transdiff.stages.base import TransDiffStage as TransDiffStage
    from lit_transdiff.stages.optim import OPTIMIZERS as OPTIMIZERS
    from lit_transdiff.stages.optim import SCHEDULES as SCHEDULES
    from lit_transdiff.study import plots as plots
    from lit_transdiff.study.compare import compare as compare
    from lit_transdiff.study.runs import runs as runs
    from lit_transdiff.sweep.search import SEARCHES as SEARCHES
    from lit_transdiff.sweep.search import Search as Search
    from lit_transdiff.training.build import build as build
    from lit_transdiff.training.callbacks import CALLBACKS as CALLBACKS
    from lit_transdiff.training.trainer import train as train

__version__ = "0.1.0"

# Name -> the module that defines it, or the module itself.
PUBLIC = {
    "load_run": "config.loading",
    "RunConfig": "config",
    "build": "training.build",
    "train": "training.trainer",
    "train_and_score": "cli.pipeline",
    "TransDiff": "models.transdiff",
    "DataModule": "data.datamodule",
    "Batch": "data.dataset",
    "cache": "evaluation.prepare",
    "statistics": "evaluation.prepare",
    "load_extractor": "evaluation.features",
    "load_generator": "sampling.generator",
    "TransDiffPipeline": "sampling.pipeline",
    "push": "publish.push",
    "evaluate": "evaluation.evaluate",
    "build_fabric": "distributed",
    "runs": "study.runs",
    "compare": "study.compare",
    "plots": "study.plots",
    "grid": "sampling.pictures",
    "TransDiffStage": "stages.base",
    "Paradigm": "models.paradigm",
    "Problem": "models.paradigm",
    "Stack": "models.paradigm",
    "in_one_pass": "models.paradigm",
    "times_of_rows": "models.paradigm",
    "Family": "config",
    "ModelSettings": "config",
    "ARTransformer": "models.encoder",
    "DiffusionDecoder": "models.decoder",
    "Process": "flow.process",
    "Prediction": "flow.loss",
    "Averaging": "checkpoints.averages",
    "AutoencoderKind": "models.autoencoder",
    "Metric": "evaluation.metrics",
    "FeatureExtractor": "evaluation.extractor",
    "Features": "evaluation.extractor",
    "StrategyKind": "distributed.strategies",
    "Search": "sweep.search",
}
# The tables to which your own module adds entries (docs/extending.md), and the classes of the entries.
TABLES = {
    "STAGES": "stages",
    "PARADIGMS": "config.paradigms",
    "ENCODERS": "models.encoder",
    "DECODERS": "models.decoders",
    "CONDITIONS": "models.conditions",
    "PROCESSES": "flow.processes",
    "OBJECTIVES": "flow.loss",
    "LOSS_TERMS": "flow.loss",
    "DENSITIES": "flow.loss",
    "OPTIMIZERS": "stages.optim",
    "SCHEDULES": "stages.optim",
    "SOLVERS": "flow.solvers",
    "GRIDS": "flow.solvers",
    "GUIDANCE": "flow.guidance",
    "PART_GUIDANCE": "flow.guidance",
    "AUTOENCODERS": "models.autoencoder",
    "METRICS": "evaluation.metrics",
    "EXTRACTORS": "evaluation.features",
    "STRATEGIES": "distributed.strategies",
    "SEARCHES": "sweep.search",
    "CALLBACKS": "training.callbacks",
}
__all__ = [*PUBLIC, *TABLES]


def __getattr__(name: str) -> Any:
    """Load a public name on first use and keep it."""
    home = PUBLIC.get(name) or TABLES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{home}")
    value = globals()[name] = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
