"""The export of a preparatory stage, an autoencoder or a classifier, and its card for the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from lit_transdiff.base.files import check_file
from lit_transdiff.checkpoints.export import INFO, read_weights
from lit_transdiff.checkpoints.format import complete_checkpoints
from lit_transdiff.checkpoints.version import read_versioned
from lit_transdiff.config import RunConfig, require
from lit_transdiff.config.loading import load_run
from lit_transdiff.publish.card import classes, image_kind, trained_by, training
from lit_transdiff.stages import PREPARATORY
from lit_transdiff.study.text import markdown


@dataclass(frozen=True)
class Prepared:
    """A trained network of a preparatory stage on disk: its run, its origin, its files and validation."""

    folder: Path
    run: RunConfig
    info: Mapping[str, Any]
    files: tuple[str, ...]
    metrics: Mapping[str, float]


def read_prepared(folder: Path) -> Prepared | None:
    """The export of a preparatory stage in a folder; None for one of a generator, or of an earlier version.

    Raises ``ValueError`` or ``FileNotFoundError`` for files that are missing or damaged.
    """
    info = read_versioned(folder / INFO) if (folder / INFO).is_file() else None
    if not isinstance(info, dict) or info.get("stage") not in PREPARATORY:
        return None
    files: Any = info.get("files")
    known = isinstance(files, list) and INFO in files
    require(known, f"{folder / INFO}: files", files, "the names of its files: train the run again")
    for name in files:
        check_file(folder / name)
    checkpoints = complete_checkpoints(folder.parent / "checkpoints")
    metrics = checkpoints[-1].manifest["metrics"] if checkpoints else {}
    return Prepared(folder, load_run(folder / "config.yaml"), info, tuple(files), metrics)


def prepared_card(prepared: Prepared, repo: str, licence: str) -> str:
    """The text of ``README.md``, with metadata that the Hub reads."""
    run, info, name = prepared.run, prepared.info, repo.split("/")[1]
    data = ModelCardData(
        license=licence,
        library_name="diffusers" if run.stage == "autoencoder" else "lit-transdiff",
        tags=["lit-transdiff", run.stage],
        model_name=name,
    )
    files = [prepared.folder / file for file in prepared.files if file.endswith(".safetensors")]
    weights = {f"{file.name} {key}": value for file in files for key, value in read_weights(file).items()}
    rows = [(name, f"{value:.4g}") for name, value in prepared.metrics.items() if name.startswith("val/")]
    parts = [
        f"# {name}",
        f"{what_it_is(run, info)} {trained_by(run)}.",
        *(["## Use", USES[run.stage].format(repo=repo, stage=run.stage)] if run.stage in USES else []),
        "## Training",
        training(run, info, weights),
        "## Validation",
        markdown(("metric", "value"), rows).rstrip() if rows else "Not known.",
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def what_it_is(run: RunConfig, info: Mapping[str, Any]) -> str:
    if run.stage == "autoencoder":
        channels = run.autoencoder_training.latent_channels
        return f"An autoencoder of {image_kind(run)} with {channels} latent channels."
    if run.stage in USES:
        return f"A classifier of {image_kind(run)} of {classes(run, info)}, whose features score generators."
    return f"A network of {image_kind(run)}."  # a network of the user's own stage


OF_AUTOENCODER = """A run takes it as its autoencoder:

```yaml
autoencoder: {{kind: kl, path: hf://{repo}}}
```

In Python, with diffusers (its `config.json` has the mean and standard deviation of the latents):

```python
from diffusers import AutoencoderKL

autoencoder = AutoencoderKL.from_pretrained("{repo}")
```"""
OF_CLASSIFIER = """An evaluation takes it as its extractor:

```yaml
evaluation: {{extractor: {stage}, extractor_weights: hf://{repo}}}
```"""
USES = {"autoencoder": OF_AUTOENCODER, "classifier": OF_CLASSIFIER, "judge": OF_CLASSIFIER}
