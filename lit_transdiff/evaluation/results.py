"""Result files: ``evaluations/<run>-<hash>.json`` with scores and manifest, and a picture beside it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from lit_transdiff.base.files import replace_file, sealed, whole
from lit_transdiff.base.hub import is_on_hub
from lit_transdiff.checkpoints.run_folder import git_commit, package_versions
from lit_transdiff.checkpoints.version import read_starts, read_versioned
from lit_transdiff.config import EvaluationConfig, SamplingConfig
from lit_transdiff.config.paths import export_folder
from lit_transdiff.evaluation.functions import INCEPTION_PART
from lit_transdiff.evaluation.references import images_hash
from lit_transdiff.evaluation.scores import DECIDING, DECIDING_IF_SET, FOLDER, Score

if TYPE_CHECKING:
    from lit_transdiff.evaluation.representations import Representation
    from lit_transdiff.sampling.generator import Generator


ADDED = (
    "part_guidance",
    "num_parts",
    "diffusion",
    "last_step",
    "rtol",
    "atol",
)  # sampler settings added after the first results


def manifest(
    generator: Generator,
    settings: EvaluationConfig,
    sampling: SamplingConfig,
    representations: Sequence[Representation],
) -> dict[str, Any]:
    """All conditions of the scores, and their origin."""
    run, device = generator.run, generator.device
    first, *further = representations
    reference = first.reference
    return {
        "run": run.name,
        "stage": run.stage,
        "num_references": run.model.num_references,
        "scored_reference": "all" if settings.keep == "all" else run.model.num_references - 1,  # in the row
        "checkpoint": generator.checkpoint,
        "weights": generator.weights,
        "weights_fingerprint": generator.fingerprint,
        **origin(generator.checkpoint),
        "num_images": settings.num_images,
        "seed": settings.seed,
        "image_seeds": "seed * 1000003 + index",  # for a row, the seed of its first scored image
        "label_mode": settings.label_mode,
        "metrics": list(settings.metrics),
        "num_neighbours": settings.num_neighbours,
        "inception_score_part": INCEPTION_PART,
        "sampling": said(sampling),
        "precision": {"fp32": "float32", "bf16": "bfloat16"}[generator.chosen(sampling.precision)],
        "matmul_precision": torch.get_float32_matmul_precision(),
        "batch_size": settings.batch_size,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "extractor": first.extractor.name,
        "extractor_weights": settings.extractor_weights,
        "reference": reference.path if reference else settings.reference_images,
        **first.identity(),
        "extractors": {one.extractor.name: one.identity() for one in further},
        "real_images": settings.real_images,
        "real_images_hash": images_hash(settings.real_images, run.data),
        "training_images": settings.training_images,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "evaluation_commit": git_commit(),
        "versions": package_versions(),
    }


def said(sampling: SamplingConfig) -> dict[str, Any]:
    """The sampler's settings; newer ones only if changed, so that names of earlier results remain valid."""
    plain = {field.name: field.default for field in dataclasses.fields(sampling) if field.name in ADDED}
    return {
        name: value
        for name, value in dataclasses.asdict(sampling).items()
        if name not in ADDED or value != plain[name]
    }


def origin(checkpoint: str) -> dict[str, Any]:
    """The export's training record and the git commit of the run's last start; empty for models in memory."""
    if not is_on_hub(checkpoint) and not Path(checkpoint).exists():
        return {"training": None, "training_commit": None}
    folder = export_folder(checkpoint)
    environment = folder.parent / "environment.json"
    starts = read_starts(environment) if environment.is_file() else []
    training = read_versioned(folder / "export.json")
    return {"training": training, "training_commit": starts[-1].get("git_commit") if starts else None}


def result_name(record: dict[str, Any]) -> str:
    """The run's name and 8 digits of the hash of the settings that affect the scores."""
    known = {key: record[key] for key in DECIDING}
    known |= {key: record[key] for key in DECIDING_IF_SET if record.get(key)}
    deciding = json.dumps(known, sort_keys=True)
    return f"{record['run']}-{hashlib.sha256(deciding.encode()).hexdigest()[:8]}"


def result_file(output: Path, record: dict[str, Any]) -> Path:
    """The path of the result of a manifest."""
    return Path(output) / FOLDER / f"{result_name(record)}.json"


def write_result(file: Path, scores: dict[str, Score], record: dict[str, Any], picture: Image.Image) -> None:
    """Write the picture, then the JSON ``file``, each completely or not at all."""
    with whole(file.with_suffix(".png")) as partial:
        picture.save(partial, format="png")
    replace_file(file, sealed({"scores": scores, "manifest": record}))
