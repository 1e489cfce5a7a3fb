"""A trained model on disk: ``model.safetensors`` (averaged weights), ``config.yaml`` and ``export.json``.

``export.json`` contains the CRC-32 of the other files. All commands that use a trained model read this form;
a run folder stands for its ``export`` folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lit_transdiff.base.files import (
    Damaged,
    check_file,
    crc32_of_files,
    naming_full,
    replace_file,
    sealed,
    short_hash,
)
from lit_transdiff.checkpoints.averages import EMA, POWER, combination, width_of
from lit_transdiff.checkpoints.format import Checkpoint, complete_checkpoints
from lit_transdiff.checkpoints.portable import INFO, OF_DIFFUSERS, write_generator
from lit_transdiff.checkpoints.version import read_versioned, versioned
from lit_transdiff.config import RunConfig, require, unknown
from lit_transdiff.config.loading import load_run, run_from, save_yaml, setting, to_dict
from lit_transdiff.config.paths import checkpoints_folder, export_folder
from lit_transdiff.config.targets import (
    below,
    beside,
    contents,
    files_in,
    put_files,
    refuse_foreign,
)

# The possible files of an export of an earlier version, which does not list them.
OF_NETWORKS = ("model", "left_over", "diffusion_pytorch_model", "classifier")
FILES = ("config.yaml", "config.json", INFO, *(f"{name}.safetensors" for name in OF_NETWORKS), *OF_DIFFUSERS)
# Path settings that a trained model needs; an export also stores them relative to its folder.
OF_SCORES = "evaluation.extractor_weights", "evaluation.reference"
EXPORT_PLACES = ("autoencoder.path", *OF_SCORES, "data.train", "data.evaluation")
FARTHEST = 0.1  # maximal relative distance of a combination of averages from the requested profile


@dataclass(frozen=True)
class Export:
    """A trained model on disk: its run, its weights and their origin (step, images seen, versions)."""

    folder: Path
    run: RunConfig
    state: dict[str, Tensor]
    info: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the weights file, 16 hexadecimal digits."""
        return short_hash(self.folder / "model.safetensors")


def read_export(path: str | Path) -> Export:
    """Read a trained model from a run folder or an export folder.

    Raises ``FileNotFoundError`` or ``ValueError`` naming the file that is missing or damaged.
    """
    folder = export_folder(path)
    info = read_info(folder / INFO)
    check_file(folder / "config.yaml")
    run = with_valid_paths(load_run(folder / "config.yaml"), folder, info)
    return Export(folder, run, read_weights(folder / "model.safetensors"), info)


def paths_from(folder: Path, run: RunConfig) -> dict[str, str]:
    """The paths of ``EXPORT_PLACES`` in the run's settings, relative to ``folder``."""
    settings = to_dict(run)
    paths = {name: setting(settings, name) for name in EXPORT_PLACES}
    return {name: os.path.relpath(path, folder) for name, path in paths.items() if path and "://" not in path}


def with_valid_paths(run: RunConfig, folder: Path, info: Mapping[str, Any]) -> RunConfig:
    """The run of the export in ``folder``; paths in it, and those that no longer exist, are relative to it.

    An export of an earlier version has no relative paths; it lies in its run's folder.
    """
    settings, known = to_dict(run), info.get("paths")
    for name, path in (known if isinstance(known, dict) else paths_from(run.folder / "export", run)).items():
        there = folder / str(path)
        lost = not str(path).startswith("..") or not Path(setting(settings, name) or "").exists()
        if name in EXPORT_PLACES and there.exists() and lost:
            section, field = name.split(".")
            settings[section][field] = str(there.resolve())
    return run_from(settings, source=str(folder / "config.yaml"))


def read_info(file: Path) -> dict[str, Any]:
    """Read ``export.json``."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist.")
    info = read_versioned(file)
    if isinstance(info, dict) and "unfinished" in info:
        raise ValueError(f"{file.parent}: {info['unfinished']}.")
    known = (
        isinstance(info, dict)
        and isinstance(info.get("autoencoder"), str)
        and isinstance(info.get("class_names"), list)
    )
    allowed = "what an export says: autoencoder, a fingerprint, class_names, a list, and more"
    require(known, f"{file}: content", info, allowed)
    return info


def read_weights(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. Raises ``ValueError`` with its name if it is damaged."""
    check_file(file)
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is not a whole safetensors file: {error}") from error


def export_run(
    run_folder: Path, step: int | None, average: str, output: str | None, *, half: bool = False
) -> Path:
    """Export a checkpoint of a run folder (by default the last one) and return the new folder.

    ``half``: in float16, which takes half the space and rounds weights by up to 0.05 %.
    """
    checkpoints = {
        checkpoint.step: checkpoint for checkpoint in complete_checkpoints(checkpoints_folder(run_folder))
    }
    if not checkpoints:
        raise FileNotFoundError(f"{run_folder} holds no complete checkpoint.")
    chosen = max(checkpoints) if step is None else step
    require(chosen in checkpoints, "--step", chosen, f"one of {sorted(checkpoints)}")
    folder = Path(output) if output else run_folder / f"export-{chosen:08d}"
    check_export_folder(folder, run_folder)
    combines = width_of(average) is not None
    used = [c for step, c in sorted(checkpoints.items()) if step == chosen or (combines and step < chosen)]
    for checkpoint in used:
        if (file := checkpoint.damaged_file()) is not None:
            damage = f"{checkpoint.folder / file} is damaged: it is not what was written."
            raise ValueError(f"{damage} Complete steps: {sorted(checkpoints)}.")
    *earlier, last = [checkpoint.index() for checkpoint in used]
    export_checkpoint(last, folder, average, earlier, half=half)
    return folder


def export_checkpoint(
    checkpoint: Checkpoint,
    folder: Path,
    average: str = EMA,
    earlier: Sequence[Checkpoint] = (),
    *,
    own: bool = False,
    half: bool = False,
) -> None:
    """Export a checkpoint of a generator's stage, whatever strategy and number of ranks wrote it.

    ``average`` is one of the checkpoint's averages, ``last`` for the weights themselves, or a power-function
    average of any width, computed from the averages of this and the ``earlier`` checkpoints. ``half``: in
    float16. ``own``: see ``write_export``.
    """
    training = checkpoint.training()
    run, info = run_from(training["run"]), training["info"]
    width = width_of(average)
    if average in (*checkpoint.averages, "last"):
        weights = checkpoint.weights(None if average == "last" else average)
        decay = run.optimizer.ema_decay if average == EMA else average.removeprefix("ema_")
        origin = "last" if average == "last" else f"ema {decay}"
    elif width is not None:
        weights, distance = combined([*earlier, checkpoint], width)
        origin = f"power-function average of width {width} (profile within {distance:.1%})"
    else:
        raise unknown("average", average, [*checkpoint.averages, "last"])
    state = {name.removeprefix("model."): value.contiguous() for name, value in weights.items()}
    if half:
        state = {name: value.half() if value.is_floating_point() else value for name, value in state.items()}
    seen = checkpoint.manifest["images_seen"]
    info = {**info, "step": checkpoint.step, "images_seen": seen, "weights": origin}
    write_export(folder, run, info, lambda partial: write_generator(state, partial), own=own)


def combined(checkpoints: Sequence[Checkpoint], width: float) -> tuple[dict[str, Tensor], float]:
    """Weights and buffers with the power-function average of ``width`` at the last of ``checkpoints``.

    Also returns the relative distance of its profile. Raises ``ValueError`` if that is more than
    ``FARTHEST``.
    """
    stored = [
        (checkpoint, state) for checkpoint in checkpoints for state in checkpoint.averages if width_of(state)
    ]
    allowed = "a run with optimizer.power_widths, as in [0.05, 0.1]"
    require(len(stored) > 0, "--average", f"{POWER}{width}", allowed)
    updates = {
        checkpoint.step: checkpoint.training()["param_groups"][0]["num_updates"] for checkpoint in checkpoints
    }
    snapshots = [(updates[checkpoint.step], width_of(state) or 0.0) for checkpoint, state in stored]
    factors, distance = combination(snapshots, updates[checkpoints[-1].step], width)
    widths = sorted({width for _, width in snapshots})
    got = f"{width}, which the averages of {len(checkpoints)} checkpoints give within {distance:.0%} only"
    allowed = f"widths near {widths}; more checkpoints kept reach farther"
    require(distance <= FARTHEST, "--average: width", got, allowed)
    weights = checkpoints[-1].weights(None)
    for name in {name for name, state in checkpoints[-1].slices if state == stored[-1][1]}:
        total = torch.zeros(checkpoints[-1].shapes[name], dtype=torch.float64)
        for (checkpoint, state), factor in zip(stored, factors.tolist(), strict=True):
            total.add_(checkpoint.tensor(name, state), alpha=factor)
        weights[name] = total.float()
    return weights, distance


def unshared(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors without shared memory, as safetensors requires."""
    result: dict[str, Tensor] = {}
    places: set[int] = set()
    for key, value in state.items():
        value = value.contiguous()
        place = value.untyped_storage().data_ptr()
        result[key] = value.clone() if place in places else value
        places.add(place)
    return result


def write_export(
    folder: Path,
    run: RunConfig,
    info: Mapping[str, Any],
    write_weights: Callable[[Path], None],
    *,
    own: bool = False,
) -> None:
    """Write a trained model to ``folder`` as a whole, in place of an earlier export; other files stay.

    ``own`` is true for a folder that belongs to this program by its position in a run folder. Any other that
    contains files but no export is refused with ``ValueError``, and so is a file.
    """
    folder = folder.resolve()  # a link stands for its target
    earlier = earlier_files(folder, own)
    with naming_full(folder), beside(folder) as new:
        write_weights(new)
        save_yaml(run, new / "config.yaml")
        names = sorted({*files_in(new), INFO})
        about = versioned(info) | {"paths": paths_from(folder, run), "files": names}
        about["crc32"] = crc32_of_files(new)
        replace_file(new / INFO, sealed(about))
        reason = "a new export was being put here: export again"
        unfinished = {"unfinished": reason, "files": sorted({*earlier, *names})}
        put_files(new, folder, earlier, INFO, lambda: replace_file(folder / INFO, sealed(unfinished)))


def earlier_files(folder: Path, own: bool = False) -> Collection[str]:
    """The files of the export in a folder, if any. Raises ``ValueError`` if it contains other things."""
    there = contents(folder)
    try:
        info = read_versioned(folder / INFO) if INFO in there else {}
    except Damaged:  # by a power failure
        info = {}
    if not isinstance(info, dict) or not any(
        keys <= info.keys() for keys in ({"autoencoder", "class_names"}, {"unfinished"})
    ):
        if there and not own:
            refuse_foreign(folder, there, "an export")
        info = {}
    named = info.get("files", FILES)
    require(isinstance(named, list | tuple), f"{folder / INFO}: files", named, "names of files")
    return [name for name in named if below(folder, name, f"{folder / INFO}: files").is_file()]


def check_export_folder(folder: Path, run_folder: Path) -> None:
    """Refuse early a folder that ``export`` would not replace, including those of a run itself."""
    place = folder.resolve()
    earlier_files(place)
    theirs = place.name in ("export", "best") and place.exists() and (place.parent / "config.yaml").is_file()
    allowed = "another name; this one is a trained model that its run keeps there"
    require(not theirs, "--output", str(folder), allowed)
    checkpoints = (run_folder / "checkpoints").resolve()
    allowed = f"a folder outside of {checkpoints}"
    require(not place.is_relative_to(checkpoints), "--output", str(folder), allowed)
