"""The parts of a sweep over a tiny run."""

from __future__ import annotations

from pathlib import Path

from lit_transdiff.config.loading import to_yaml
from tests.helpers.small import small_run

TINY = [
    *(
        "model.size=test",
        "training.max_steps=4",
        "training.log_every=2",
        "training.validate_every=2",
        "sampling.num_steps=2",
    ),
    *("training.global_batch_size=8", "training.num_validation_samples=16", "optimizer.warmup_steps=2"),
]


def train_command(recipe: Path, *words: str) -> list[str]:
    """A sweep file's ``command`` that trains a recipe with ``words`` and the trial's settings."""
    return [
        "${env}",
        "${interpreter}",
        "-m",
        "lit_transdiff",
        "train",
        str(recipe),
        *words,
        "${args_no_hyphens}",
    ]


def write_recipe(folder: Path) -> Path:
    """A run on the bundled images without an autoencoder."""
    file = folder / "recipe.yaml"
    file.write_text(to_yaml(small_run(folder / "runs", tracking={"wandb": True, "project": "p"})))
    return file
