"""Reproduce a row of the paper's table: convert the released files, generate, score and compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric import Fabric

from lit_transdiff.base.files import json_of, short_hash
from lit_transdiff.config import EvaluationConfig, RunConfig, require, require_known
from lit_transdiff.config.loading import load_run
from lit_transdiff.config.paths import check_files
from lit_transdiff.config.targets import below
from lit_transdiff.evaluation.evaluate import evaluate
from lit_transdiff.evaluation.features import load_extractor
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import value
from lit_transdiff.evaluation.statistics import check_extractor, load_statistics
from lit_transdiff.flow.solvers import steps_in_words
from lit_transdiff.models.ldm import is_ldm
from lit_transdiff.released.convert import convert, converted_from
from lit_transdiff.released.files import CHECKPOINT, read_torch_file
from lit_transdiff.sampling.generator import load_generator

BASELINES = "baselines.json"
PUBLISHED = {"frechet_distance": "fid", "inception_score": "inception_score"}  # metric -> field of a row


@dataclass(frozen=True)
class Files:
    """Paths: the checkpoint (or its folder), the autoencoder, InceptionV3, the reference statistics."""

    weights: Path
    vae: Path
    inception: Path
    reference: Path

    @property
    def checkpoint(self) -> Path:
        return self.weights / CHECKPOINT if self.weights.is_dir() else self.weights

    def check(self, settings: EvaluationConfig) -> None:
        """Refuse missing files and mismatched statistics before any work starts."""
        check_files({**vars(self), "weights": self.checkpoint})
        check_extractor(load_statistics(self.reference), load_extractor(settings.extractor, self.inception))


def published_row(name: str, experiments: Path) -> dict[str, Any]:
    """The published row ``name`` of ``baselines.json``, which must have a recipe."""
    file = experiments / BASELINES
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; run in the project folder or set --experiments.")
    rows = {key: row for key, row in json_of(file.read_text())["rows"].items() if "recipe" in row}
    require_known("row", name, rows)
    return rows[name]


def reproduce(
    name: str,
    files: Files,
    output: Path,
    *,
    fabric: Fabric,
    experiments: Path,
    overrides: Sequence[str] = (),
) -> str:
    """Reproduce the row ``name`` (such as ``L-MRAR``) in ``output`` and return the table.

    Completed steps are skipped. All settings are the recipe's; the table mentions any ``overrides``.
    """
    row = published_row(name, experiments)
    paths = [f"evaluation.extractor_weights={files.inception}", f"evaluation.reference={files.reference}"]
    recipe = load_run(experiments / row["recipe"], [*paths, *overrides])
    files.check(recipe.evaluation)
    if fabric.is_global_zero:
        convert_files(name, files, output, recipe)
    fabric.barrier()
    model = output / name
    generator = load_generator(model, fabric.device)
    result = evaluate(generator, recipe.evaluation, recipe.sampling, output=model, fabric=fabric, reuse=True)
    return scores_table(name, row, result, overrides)


def convert_files(name: str, files: Files, output: Path, recipe: RunConfig) -> None:
    """Convert the autoencoder and the model, unless an earlier call converted them from the same files."""
    autoencoder, model = output / "autoencoder", below(output, name, BASELINES)
    if not autoencoder.exists():
        state = read_torch_file(files.vae)
        allowed = "an autoencoder of latent diffusion, such as kl16.ckpt"
        require(is_ldm(state.get("model", state)), "vae", str(files.vae), allowed)
        print(convert(files.vae, autoencoder))
    check_origin(autoencoder, files.vae)
    if not model.exists():
        print(convert(files.checkpoint, model, autoencoder=autoencoder, recipe=recipe))
    check_origin(model, files.checkpoint)


def check_origin(folder: Path, file: Path) -> None:
    """Raise ``ValueError`` if an existing folder was converted from another file than the one given now."""
    origin = converted_from(folder)
    allowed = "that file; or another --output, or remove the folder"
    fits = origin.get("hash") == short_hash(file)
    require(fits, str(folder), f"converted from another {origin.get('file')} than {file}", allowed)


def scores_table(name: str, row: dict[str, Any], result: dict[str, Any], overrides: Sequence[str]) -> str:
    """Our scores beside the published ones, with the settings behind ours."""
    made = result["manifest"]
    head = f"{'':22} {'ours':>10} {'published':>10}"
    lines = [f"{row['model']}, {row['resolution']} x {row['resolution']}", head]
    for metric, score in result["scores"].items():
        published = row.get(PUBLISHED.get(metric, ""))
        theirs = "-" if published is None else published
        lines.append(f"{METRICS[metric].title:22} {value(score):10.4g} {theirs:>10}")
    sampling = made["sampling"]
    guidance = sampling["reference_guidance"] or sampling["guidance_scale"]
    lines += [
        f"{made['num_images']:,} images, {made['label_mode']} labels, {sampling['solver']} "
        f"{steps_in_words(sampling)}, guidance {guidance}, scales {sampling['drift_scale']} and "
        f"{sampling['noise_scale']}, {made['precision']}",
        f"published: {row['source']}",
        f"ours: {result['file']}",
    ]
    return "\n".join(lines + ([f"not the paper's settings: {' '.join(overrides)}"] if overrides else []))
