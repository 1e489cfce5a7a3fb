"""Lossless conversion of released checkpoints (``checkpoint-last.pth``, ``kl16.ckpt``) to ours and back.

A converted TransDiff is an export folder of the averaged weights (``model_ema``). Its subfolder ``raw`` is
an export folder of the last weights (``model``). Tensors without a counterpart in our model are stored
beside the weights in ``left_over.safetensors``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_transdiff.base.files import CHECKSUMS, crc32_of_files, json_of, replace_file, sealed, whole
from lit_transdiff.checkpoints.export import read_export, read_weights, unshared, write_export
from lit_transdiff.checkpoints.format import save_pickled
from lit_transdiff.checkpoints.portable import write_generator
from lit_transdiff.config import RunConfig, require
from lit_transdiff.config.loading import run_from, to_dict
from lit_transdiff.config.paths import check_source, export_folder
from lit_transdiff.config.targets import save_tensors
from lit_transdiff.models.autoencoder import CONFIG_FILE, Autoencoder, KLAutoencoder, load_autoencoder
from lit_transdiff.models.ldm import TRAINING_ONLY, is_ldm
from lit_transdiff.models.state_dicts import Mapped
from lit_transdiff.released.families import Hints
from lit_transdiff.released.files import (
    AVERAGES,
    KNOWN,
    ReleasedFile,
    check_tensors,
    identity,
    json_safe,
    read_torch_file,
    released_file,
    released_parts,
    state_dict,
)
from lit_transdiff.released.layouts import IMAGE_SIZE, layout_for, layout_in

LEFT_OVER = "left_over.safetensors"
ORIGIN = "released.json"  # in an autoencoder's folder: the file that it was converted from
LATENT_SCALE = 0.2325  # scaling of the released TransDiff models (and MAR's): latents = samples x 0.2325


def convert(
    source: str | Path,
    dest: str | Path,
    *,
    autoencoder: str | Path | None = None,
    recipe: RunConfig | None = None,
    num_heads: int | None = None,
    scaling_factor: float | None = None,
) -> str:
    """Convert ``source`` to ``dest`` in the direction that it implies, and return a report on every tensor.

    A released TransDiff file (or its folder) becomes an export folder: ``autoencoder`` is the folder of its
    converted autoencoder, and ``recipe`` provides all settings except the model's shape (sampling,
    evaluation, ...), which must agree with the file. A latent-diffusion autoencoder becomes a diffusers
    folder, whose latents are samples times ``scaling_factor`` (default: ``LATENT_SCALE``). An export folder,
    run folder or autoencoder folder becomes a file again. Raises ``ValueError`` for any mismatch, for an
    option that has no effect on ``source``, and for a ``dest`` that exists.
    """
    source, dest = Path(source), Path(dest)
    options = dict(autoencoder=autoencoder, recipe=recipe, num_heads=num_heads, scaling_factor=scaling_factor)
    given = {name for name, value in options.items() if value is not None}
    check_source(source)
    allowed = "a name that does not exist yet: nothing is overwritten"
    require(not os.path.lexists(dest), "dest", str(dest), allowed)
    file = released_file(source)
    if file.is_dir():
        check_options(given, set(), f"{file}, which becomes a file again")
        dest.parent.mkdir(parents=True, exist_ok=True)
        write = autoencoder_to_ldm if (file / CONFIG_FILE).is_file() else export_to_released
        return write(file, dest)
    content = read_torch_file(file)
    bare = not KNOWN & content.keys()
    require("model" in content or bare, f"{file}: entries", sorted(content), "model, and beside it model_ema")
    state = state_dict(content.get("model", content), "model", file)
    content = state if bare else content | {"model": state}
    if is_ldm(state):
        check_options(given, {"scaling_factor"}, f"the autoencoder {file}")
        return autoencoder_from_ldm(
            file, state, dest, LATENT_SCALE if scaling_factor is None else scaling_factor
        )
    what = f"{file}, with {', '.join(list(content)[:3]) or 'nothing'}, ..."
    layout = layout_in(state, what, recipe)
    check_options(given, {"autoencoder", "recipe", "num_heads"}, f"the checkpoint {file} ({layout.paradigm})")
    if autoencoder is None:
        raise ValueError("autoencoder: got nothing; allowed: the folder of the model's autoencoder.")
    network = load_autoencoder("kl", autoencoder, image_channels=3)
    return released_to_export(
        released_parts(file, content), dest, network, Path(autoencoder), recipe, num_heads
    )


def check_options(options: set[str], effective: set[str], source: str) -> None:
    """Refuse options that have no effect on ``source``."""
    allowed = ", ".join(sorted(effective)) or "none"
    require(options <= effective, "options", sorted(options - effective), f"for {source}: {allowed}")


def released_to_export(
    checkpoint: ReleasedFile,
    dest: Path,
    autoencoder: Autoencoder,
    autoencoder_path: Path,
    recipe: RunConfig | None,
    num_heads: int | None,
) -> str:
    """Write the export folder of a released checkpoint."""
    run = run_of(checkpoint, dest.name, autoencoder, autoencoder_path, recipe, num_heads)
    averaged = {"ema": checkpoint.model_ema} if checkpoint.model_ema is not None else {}
    states: dict[str, dict[str, Tensor]] = averaged | {"last": checkpoint.model}
    names = {"ema": checkpoint.average, "last": "model"}
    mapped = {kind: map_state(names[kind], state, run) for kind, state in states.items()}
    info = {
        "name": run.name,
        "stage": run.stage,
        "step": None,
        "images_seen": None,
        "autoencoder": autoencoder.fingerprint,
        "class_names": [str(c) for c in range(run.model.num_classes)],
        "released": {
            **identity(checkpoint.path),
            "epoch": checkpoint.epoch,
            "args": json_safe(checkpoint.args),
            "average": checkpoint.average,
            "made": list(mapped["last"].made),
        },
    }
    best, *others = mapped

    def write_all(folder: Path) -> None:
        write_weights(mapped[best], folder)
        for kind in others:
            write_export(folder / "raw", run, {**info, "weights": kind}, partial(write_weights, mapped[kind]))

    write_export(dest, run, {**info, "weights": best}, write_all)
    return conversion_report(checkpoint, dest, run, mapped)


def map_state(name: str, state: Mapping[str, Tensor], run: RunConfig) -> Mapped:
    """Map a released state to our names; errors give its ``name`` in the file."""
    try:
        return layout_for(run.model).from_released(state, run.model)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def write_weights(mapped: Mapped, folder: Path) -> None:
    """Write ``model.safetensors`` in the dtype of the file, and the tensors without a place in our model."""
    write_generator(unshared(mapped.state), folder)
    if mapped.left_over:
        save_tensors(unshared(mapped.left_over), folder / LEFT_OVER)


def run_of(
    checkpoint: ReleasedFile,
    name: str,
    autoencoder: Autoencoder,
    autoencoder_path: Path,
    recipe: RunConfig | None,
    num_heads: int | None,
) -> RunConfig:
    """The run of a released checkpoint: shapes from the files, all other settings from ``recipe``."""
    layout = layout_in(checkpoint.model, str(checkpoint.path), recipe)
    size = IMAGE_SIZE // autoencoder.downsampling if recipe is None else recipe.model.latent_size
    if recipe is not None and num_heads is None:
        num_heads = getattr(recipe.model, "num_heads", None)
    implied = layout.settings(checkpoint.model, Hints(autoencoder.latent_channels, size, num_heads))
    shape = implied["model"]
    channels, side = shape["latent_channels"], shape["latent_size"]
    image_size = side * autoencoder.downsampling
    if recipe is not None:
        check_recipe(recipe, shape, checkpoint.path)
    fits = autoencoder.latent_channels == channels
    require(fits, "autoencoder: latent channels", autoencoder.latent_channels, f"{channels}")
    if recipe is not None:
        where = f"{autoencoder_path}: image size of latents of {side} x {side}"
        allowed = f"data.image_size={recipe.data.image_size} of the recipe"
        require(image_size == recipe.data.image_size, where, image_size, allowed)
    settings = to_dict(recipe or RunConfig())
    settings |= {
        "name": name,
        "stage": implied["stage"],
        "init_from": None,
        "model": (settings["model"] if recipe else {}) | shape,
        "sampling": settings["sampling"] | ({} if recipe else implied.get("sampling", {})),
        "autoencoder": {"kind": "kl", "path": str(autoencoder_path)},
        "data": settings["data"] | {"image_size": image_size, "image_channels": 3},
    }
    return run_from(settings, source=str(checkpoint.path))


def check_recipe(recipe: RunConfig, shape: Mapping[str, Any], path: Path) -> None:
    """Raise ``ValueError`` for settings of a recipe's model that are not those of the file."""
    given = {key: getattr(recipe.model, key) for key in shape if key != "size"}
    differ = {key: value for key, value in given.items() if value != shape[key]}
    wrong = [f"model.{key}: {shape[key]} in the checkpoint, {differ[key]} in the recipe" for key in differ]
    if wrong:
        raise ValueError(f"{path} has a different shape than the recipe: {'; '.join(wrong)}")


def conversion_report(
    checkpoint: ReleasedFile, dest: Path, run: RunConfig, mapped: Mapping[str, Mapped]
) -> str:
    """Report the result for every entry and tensor."""
    model = run.model
    latents = f"latents of {model.latent_size} x {model.latent_size} x {model.latent_channels}"
    lines = [f"{checkpoint.path} -> {dest}: {layout_for(model).summary(model)}, {latents}"]
    for name, part in mapped.items():
        entry = checkpoint.average if name == "ema" else "model"
        place = dest if part is next(iter(mapped.values())) else dest / "raw"
        count = sum(value.numel() for value in [*part.state.values(), *part.left_over.values()])
        lines.append(f"{entry}: {len(part.state)} tensors mapped, {count:,} parameters -> {place}")
        lines += [
            f"  kept aside: {key} {list(value.shape)}, which has no place in the model"
            for key, value in part.left_over.items()
        ]
    if "ema" not in mapped:
        lines.append("model_ema: not in the file; model is used instead")
    return "\n".join(lines + [f"not converted: {name}" for name in checkpoint.ignored])


def export_to_released(source: Path, dest: Path) -> str:
    """Write an export (our own or a converted one) as a released checkpoint."""
    folder = export_folder(source)
    require(dest.suffix in (".pth", ".pt"), "dest", str(dest), "a file name ending in .pth or .pt")
    export = read_export(folder)
    layout_for(export.run.model).check_model(export.run.model)
    raw = folder / "raw" if (folder / "raw" / "model.safetensors").is_file() else folder
    origin = export.info.get("released", {})
    average, made = origin.get("average", AVERAGES[0]), origin.get("made", [])
    states = {"model": released_state(raw), average: released_state(folder)}
    if export.info.get("weights") == "last":  # the file had no averaged weights
        del states[average]
    content: dict[str, Any] = {}
    for name, mapped in states.items():
        content[name] = {key: value for key, value in mapped.state.items() if key not in made}
    content |= {"epoch": origin["epoch"]} if origin.get("epoch") is not None else {}
    content |= {"args": argparse.Namespace(**origin["args"])} if origin.get("args") else {}
    with whole(dest) as file:
        save_pickled(content, file)
    counts = ", ".join(f"{key} ({len(mapped.state)} tensors)" for key, mapped in states.items())
    zeros = states[average if average in states else "model"].left_over
    lines = [f"{folder} -> {dest}: {counts}"]
    lines += [f"  made of zeros: {key} (the model has none; it has no effect)" for key in zeros]
    if raw == folder and average in states:
        lines.append("  model: the averaged weights, as the export has no others")
    return "\n".join(lines)


def released_state(folder: Path) -> Mapped:
    """The released state dict of an export folder."""
    left_over = read_weights(folder / LEFT_OVER) if (folder / LEFT_OVER).is_file() else {}
    export = read_export(folder)
    return layout_for(export.run.model).to_released(export.state, export.run.model, left_over)


def converted_from(folder: Path) -> dict[str, Any]:
    """The recorded source file of a converted export or autoencoder folder; empty if it was not converted."""
    if (folder / CONFIG_FILE).is_file():
        return json_of((folder / ORIGIN).read_text()) if (folder / ORIGIN).is_file() else {}
    return read_export(folder).info.get("released", {})


def autoencoder_from_ldm(file: Path, state: Mapping[str, Tensor], dest: Path, scaling_factor: float) -> str:
    """Write a latent-diffusion autoencoder as a diffusers folder."""
    allowed = "a finite number above 0"
    require(math.isfinite(scaling_factor) and scaling_factor > 0, "scaling_factor", scaling_factor, allowed)
    weights = {key: value for key, value in state.items() if not key.startswith(TRAINING_ONLY)}
    check_tensors(weights, "model", file)
    network, dropped = KLAutoencoder.from_ldm(state, scaling_factor)
    dtypes = {value.dtype for value in weights.values()}
    dtype = one_type(dtypes)
    with whole(dest) as folder:
        network.save(folder, dtype)
        (folder / ORIGIN).write_text(json.dumps(identity(file)))
        replace_file(folder / CHECKSUMS, sealed({"crc32": crc32_of_files(folder)}))
    count = sum(p.numel() for p in network.model.parameters())
    lines = [
        f"autoencoder -> {dest}: {len(network.model.state_dict())} tensors mapped, {count:,} parameters, "
        f"latents = samples x {scaling_factor:g}, {network.latent_channels} channels, "
        f"1/{network.downsampling} of the size"
    ]
    if dtypes != {torch.float32}:
        lines.append(f"weights: {', '.join(sorted(map(str, dtypes)))} in the file, stored as {dtype}")
    return "\n".join(lines + [f"dropped: {key} (of its training)" for key in dropped])


def one_type(dtypes: set[torch.dtype]) -> torch.dtype:
    """The dtype of all weights if it is float16 or bfloat16 (exact in float32); float32 otherwise."""
    halves = len(dtypes) == 1 and dtypes <= {torch.float16, torch.bfloat16}
    return next(iter(dtypes)) if halves else torch.float32


def autoencoder_to_ldm(source: Path, dest: Path) -> str:
    """Write a diffusers folder as a latent-diffusion checkpoint."""
    require(dest.suffix in (".ckpt", ".pth"), "dest", str(dest), "a file name ending in .ckpt or .pth")
    channels = json_of((source / CONFIG_FILE).read_text()).get("in_channels")
    network = KLAutoencoder.load(source, channels)
    files = map(read_weights, source.glob("*.safetensors"))
    dtype = one_type({value.dtype for weights in files for value in weights.values()})
    state = {key: value.to(dtype) for key, value in network.to_ldm().items()}
    with whole(dest) as file:
        save_pickled({"model": state}, file)
    missing = "the layout has no entries for normalisation (mean and std of the latents)"
    return f"{source} -> {dest}: {len(state)} tensors; {missing}"
