"""The parts of a run: built and checked before training, and described for the user."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.checkpoints.places import pinned_run
from lit_transdiff.checkpoints.run_folder import check_folder
from lit_transdiff.config import RunConfig, check_effects, errors_at, require, require_known, unknown
from lit_transdiff.config.classes import embedding_rows, full_names
from lit_transdiff.config.paths import export_folder
from lit_transdiff.data.datamodule import DataModule
from lit_transdiff.data.index import ShardIndex
from lit_transdiff.data.names import class_names
from lit_transdiff.data.references import num_groups
from lit_transdiff.distributed import (
    accumulation,
    check_distributed,
    micro_batch_size,
    precision_of,
    strategy_name,
    world_size,
)
from lit_transdiff.distributed.sizes import check_sizes
from lit_transdiff.evaluation.metrics import check_evaluation
from lit_transdiff.models.adapt import match
from lit_transdiff.models.autoencoder import Autoencoder, autoencoder_kind, load_autoencoder
from lit_transdiff.models.paradigm import Paradigm, network_class
from lit_transdiff.sampling.loop import check_sampling
from lit_transdiff.stages import PREPARATORY, STAGES
from lit_transdiff.stages.base import Stage, TransDiffStage
from lit_transdiff.stages.contract import check_family
from lit_transdiff.training.callbacks import CALLBACKS
from lit_transdiff.training.checkpointing import layout


@dataclass(frozen=True)
class Parts:
    """The parts of a run, built and checked before training."""

    run: RunConfig
    stage: pl.LightningModule
    data: pl.LightningDataModule
    autoencoder: Autoencoder | None
    report: str
    places: Mapping[str, str] = field(default_factory=dict)  # on the Hub, as they were named, with commits


def check_run(
    run: RunConfig,
    earlier_outputs: Collection[str] = (),
    *,
    own_stage: pl.LightningModule | None = None,
    own_data: bool = False,
    outline: bool = False,
) -> None:
    """Refuse unknown names, sizes that cannot work, and settings that contradict each other or the folder.

    ``earlier_outputs`` are files and folders that earlier steps of a pipeline will write. With ``outline``
    the run is not started here. ``own_stage`` replaces the stage that the run names, whose requirements are
    then not checked; ``own_data`` may have validation data of its own.
    """
    if run.stage not in STAGES and run.stage not in PREPARATORY:
        raise unknown("stage", run.stage, [*STAGES, *PREPARATORY])
    if own_stage is None:
        (STAGES | PREPARATORY)[run.stage].check(run)
    elif isinstance(own_stage, Stage):
        fits = pinned_run(own_stage.run)[0] == pinned_run(run)[0]
        require(fits, "stage: its run", own_stage.run.name, "the run that is trained, with all its settings")
    check_effects(replace(run, data=replace(run.data, evaluation="own")) if own_data else run)
    for name in run.training.callbacks:
        require_known("training.callbacks", name, CALLBACKS)
    autoencoder_kind(run.autoencoder.kind, run.autoencoder.path)
    check_sampling(run.sampling, run.model)
    scores = run.stage in STAGES and run.evaluation.every > 0
    check_evaluation(run.evaluation, scores=scores, semantic=network_class(run.model).has_features)
    check_folder(run)
    if run.init_from is not None and run.init_from not in earlier_outputs:
        export_folder(run.init_from)
    check_distributed(run)
    if own_stage is None:
        check_sizes(run, outline)
    if own_stage is None and run.stage in STAGES:
        check_family(run.model, run.sampling.solver)


def build(
    run: RunConfig, *, data: pl.LightningDataModule | None = None, stage: pl.LightningModule | None = None
) -> Parts:
    """The stage, data and autoencoder of a run; any mismatch between them is reported here.

    Any Lightning Trainer can fit the stage to the data. ``data`` (any data module that yields ``Batch``) and
    ``stage`` replace those that the run's settings name. Places on the Hub have commits in the run of the
    parts.
    """
    run, places = pinned_run(run)
    return replace(build_pinned(run, data, stage), places=places)


def build_pinned(
    run: RunConfig, data: pl.LightningDataModule | None, stage: pl.LightningModule | None
) -> Parts:
    """``build`` a run whose places on the Hub have commits."""
    check_run(run, own_stage=stage, own_data=data is not None)
    if stage is None and run.stage in PREPARATORY:
        return Parts(run, PREPARATORY[run.stage](run), data or build_data(run), None, "")
    if stage is not None and not isinstance(stage, TransDiffStage):
        return Parts(run, stage, data or build_data(run), None, "")
    autoencoder = build_autoencoder(run)
    if run.training.compile is True:
        autoencoder.compile_parts()
    data = data or build_data(run, autoencoder)
    stage = stage or STAGES[run.stage](run)
    stage.keep(autoencoder)
    names = getattr(data, "class_names", None)  # optional in a user's data module
    return Parts(run, stage, data, autoencoder, initialise_from(run, stage, names))


def build_autoencoder(run: RunConfig) -> Autoencoder:
    """The run's frozen autoencoder, checked against the latents that the model expects."""
    autoencoder = load_autoencoder(run.autoencoder.kind, run.autoencoder.path, run.data.image_channels)
    channels, size = autoencoder.latent_channels, run.data.image_size // autoencoder.downsampling
    model = run.model
    allowed = f"the autoencoder's {channels}"
    require(model.latent_channels == channels, "model.latent_channels", model.latent_channels, allowed)
    allowed = f"{size}, which is data.image_size / {autoencoder.downsampling}"
    require(model.latent_size == size, "model.latent_size", model.latent_size, allowed)
    return autoencoder


def build_data(run: RunConfig, autoencoder: Autoencoder | None = None) -> DataModule:
    """The run's data, checked against its index; latents are also checked against the ``autoencoder``."""
    preparatory = PREPARATORY.get(run.stage)
    data = DataModule(
        run.data,
        num_references=1 if preparatory else run.model.num_references,
        num_classes=run.model.num_classes,
        global_batch_size=run.training.global_batch_size,
        micro_batch_size=run.training.micro_batch_size,
        max_steps=run.training.max_steps,
        seed=run.seed,
        num_validation_samples=run.training.num_validation_samples,
        autoencoder_fingerprint=autoencoder.fingerprint if autoencoder else None,
        uses_labels=preparatory is None or preparatory.uses_labels,
    )
    data.setup("fit")
    return data


def initialise_from(
    run: RunConfig, stage: TransDiffStage, class_names: Sequence[str] | None, load: bool = True
) -> str:
    """Load the (averaged) weights of ``init_from``; report which are copied, adapted, dropped and new.

    ``class_names`` are those of the run's data, or None if not yet known. With ``load`` false only the report
    is made; the model may then be on the meta device.
    """
    if run.init_from is None:
        return ""
    export = read_export(run.init_from)
    mine, its = run.model.paradigm, export.run.model.paradigm
    allowed = f"a run of model.paradigm {mine}; this one is of {its}"
    require(mine == its, "init_from", str(export.folder), allowed)
    old = full_names(export.info["class_names"], export.run.model.num_classes)
    how = run.init_classes if class_names is not None or run.init_classes == "same" else "new"
    with errors_at(f"init_from: {export.folder}"):
        classes = embedding_rows(how, full_names(class_names or [], run.model.num_classes), old)
        weights, report = match(stage.model, export.state, run.init_positions, run.init_shapes, classes)
    if load:
        stage.model.load_state_dict(weights)
    return f"initialised from {export.folder}: {report}"


def outline(run: RunConfig, earlier_outputs: Collection[str] = ()) -> str:
    """Describe a run, checked as far as possible without the ``earlier_outputs`` that do not exist yet."""
    check_run(run, earlier_outputs, outline=True)
    trained_now = run.stage in PREPARATORY or run.autoencoder.path in earlier_outputs
    autoencoder = None if trained_now else build_autoencoder(run)
    index = None if run.data.train in earlier_outputs else build_data(run, autoencoder).index_of("data.train")
    with torch.device("meta"):  # shapes suffice; a large model takes neither time nor memory
        if run.stage in PREPARATORY:
            return describe(run, PREPARATORY[run.stage](run), index)
        stage = STAGES[run.stage](run)
    names = None if index is None else index.class_names
    if run.init_from in earlier_outputs:
        return describe(run, stage, index, f"initialised from {run.init_from}")
    report = initialise_from(run, stage, names, load=False)
    return describe(run, stage, index, report)


def describe_parts(parts: Parts) -> str:
    """``describe`` the parts of a run."""
    data, own = parts.data, type(parts.data).__name__
    index = data.index_of("data.train") if isinstance(data, DataModule) else None
    return describe(parts.run, parts.stage, index, parts.report, instead=own)


def describe(
    run: RunConfig,
    stage: pl.LightningModule,
    index: ShardIndex | None,
    report: str = "",
    instead: str = "made before this run starts",
) -> str:
    """A text of parameter counts and planned steps; ``instead`` describes data without an index."""
    training = run.training
    total, trained = count(stage.parameters()), count(p for p in stage.parameters() if p.requires_grad)
    lines = [
        f"run         {run.name} -> {run.folder}",
        f"stage       {run.stage}",
        f"parameters  {total:,} ({trained:,} trained)",
    ]
    if isinstance(stage, TransDiffStage):
        sizes = (f"{name} {count(part.parameters()):,}" for name, part in parts_of(stage.model))
        lines.append(f"            {', '.join(sizes)}")
    rows, references = training.max_steps * training.global_batch_size, run.model.num_references
    epochs = ""
    if index is not None:
        items = num_groups(index.class_counts, references)
        amount = f"{len(index):,} {index.kind}, {items:,} rows of {references}"
        lines.append(f"data        {run.data.train}: {amount}")
        epochs = f" ({rows / items:.1f} epochs)"
    else:
        lines.append(f"data        {f'{run.data.train}: ' if run.data.train else ''}{instead}")
    halves = ", weights in bfloat16" if training.precision == "bf16-true" else ""
    lines += [
        f"steps       {training.max_steps:,} of {training.global_batch_size} rows{epochs}, "
        f"{rows * references:,} images seen",
        f"batch       {world_size(run)} device(s) x {micro_batch_size(run)} x {accumulation(run)} pass(es)",
        f"strategy    {strategy_name(run)}, precision {precision_of(run)}{halves}",
    ]
    return "\n".join([*lines, *([report] if report else [])])


def parts_of(model: Paradigm) -> list[tuple[str, nn.Module]]:
    """The named submodules of a model that have weights."""
    return [(name, part) for name, part in model.named_children() if any(True for _ in part.parameters())]


def count(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def export_info(parts: Parts) -> dict[str, Any]:
    """The entries of ``export.json`` that do not depend on the step."""
    return {
        "name": parts.run.name,
        "stage": parts.run.stage,
        "autoencoder": parts.autoencoder.fingerprint if parts.autoencoder else None,
        "class_names": class_names(parts.data, parts.run.model.num_classes),
    }


def layout_of(run: RunConfig) -> dict[str, Any]:
    """The layout of a run over devices, for its checkpoints."""
    return layout(strategy_name(run), world_size(run), micro_batch_size(run), precision_of(run))
