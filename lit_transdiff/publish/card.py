"""The model card of an export: what was trained, how it draws, and its scores with their conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from torch import Tensor

from lit_transdiff import __version__
from lit_transdiff.checkpoints.export import Export
from lit_transdiff.config import RunConfig
from lit_transdiff.config.classes import full_names
from lit_transdiff.evaluation.metrics import METRICS
from lit_transdiff.evaluation.scores import Score, measured_std, value
from lit_transdiff.flow.solvers import steps_in_words
from lit_transdiff.study.records import Evaluation
from lit_transdiff.study.text import escaped, markdown

TASK = "unconditional-image-generation"  # the Hub has no name for images of classes
CARD_CLASSES, CARD_PER_CLASS = 10, 4  # classes, and images of each, in the picture
SIZES_SHOWN = ("size", "width", "depth", "encoder_blocks", "decoder_blocks", "num_references", "patch_size")
NAMED_CLASSES = 20  # more classes than these are only counted
CARD_PICTURE = "samples.png"
# The entries of a manifest that the metadata give for each score.
CARD_CONDITIONS = (
    "num_images label_mode seed extractor extractor_fingerprint reference_hash "
    "num_neighbours sampling precision weights_fingerprint"
).split()


def card_of(export: Export, repo: str, evaluations: Sequence[Evaluation], licence: str) -> str:
    """The text of ``README.md``, with metadata that the Hub reads."""
    run, main = export.run, main_evaluation(evaluations)
    data = ModelCardData(
        license=licence,
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=["lit-transdiff", "class-conditional", run.model.paradigm, run.stage],
        model_name=repo.split("/")[1],
        eval_results=None if main is None else results_of(main),
    )
    parts = [
        f"# {repo.split('/')[1]}",
        f"![Images drawn by this model, a row for each class]({CARD_PICTURE})",
        introduction(export),
        "## Images",
        usage(export, repo),
        "## Training",
        training(run, export.info, export.state, sizes(run)),
        "## Scores",
        "None yet." if main is None else scores(main),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n"))


def main_evaluation(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """The evaluation of the most images, of equal ones the newest."""
    return max(
        evaluations,
        key=lambda one: (one.manifest.get("num_images", 0), one.manifest.get("date", "")),
        default=None,
    )


def introduction(export: Export) -> str:
    run, info = export.run, export.info
    return (
        f"A generator of {image_kind(run)} of {classes(run, info)}. {trained_by(run)}; its family is "
        f"`{run.model.paradigm}`."
    )


def image_kind(run: RunConfig) -> str:
    size, colour = run.data.image_size, "grey" if run.data.image_channels == 1 else "colour"
    return f"{colour} images of {size} x {size} pixels"


def classes(run: RunConfig, info: Mapping[str, Any]) -> str:
    named = full_names(info["class_names"], run.model.num_classes)
    names = f": {escaped(', '.join(named))}" if len(named) <= NAMED_CLASSES else ""
    return f"{len(named):,} classes{names}"


def trained_by(run: RunConfig) -> str:
    return f"It was trained with lit_transdiff {__version__} in the stage `{run.stage}`"


def usage(export: Export, repo: str) -> str:
    """The commands that draw the images, in the shell and in Python."""
    imports = ", ".join(f"`{name}`" for name in export.run.imports)
    needed = f" and {imports}, modules of its authors" if imports else ""
    return f"""This command draws the picture above, with lit_transdiff{needed} installed:

```bash
{command(repo, export.run.model.num_classes)}
```

In Python, with diffusers:

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("{repo}", trust_remote_code=True)
images = pipeline(classes=[0], per_class={CARD_PER_CLASS}, seed=0).images
```

The images are the same for the same seed. A run of the same family starts from these weights with
`init_from: hf://{repo}`."""


def command(repo: str, num_classes: int) -> str:
    """The command that draws the picture of the card."""
    last = min(CARD_CLASSES, num_classes) - 1
    chosen = f"--classes {f'0-{last}' if last else '0'} --per-class {CARD_PER_CLASS} --seed 0"
    return f"lit-transdiff sample --checkpoint hf://{repo} {chosen}"


def training(run: RunConfig, info: Mapping[str, Any], state: Mapping[str, Tensor], sizes: str = "") -> str:
    """A table on the model, its data and its training."""
    count = sum(value.numel() for value in state.values())
    rows = {
        "model": f"{count:,} parameters and buffers" + (f", {sizes}" if sizes else ""),
        "data": run.data.train,
        "steps": f"{info['step']:,} of {run.training.global_batch_size:,} rows" if "step" in info else "",
        "images seen": f"{info['images_seen']:,}" if "images_seen" in info else "",
        "weights": str(info.get("weights", "")),
        "started from": run.init_from or "random weights",
        "autoencoder": f"{run.autoencoder.kind}, {info['autoencoder'][:16]}" if info["autoencoder"] else "",
        "optimizer": f"{run.optimizer.name}, learning rate {run.optimizer.lr:g}",
        "seed": str(run.seed),
    }
    return markdown(("", ""), [(name, text) for name, text in rows.items() if text]).rstrip()


def sizes(run: RunConfig) -> str:
    """The settings of a model that say how large it is."""
    given = {name: getattr(run.model, name, None) for name in SIZES_SHOWN}
    return ", ".join(f"{name} {text}" for name, text in given.items() if text is not None)


def scores(evaluation: Evaluation) -> str:
    """A table of scores and the conditions of all."""
    manifest, sampling = evaluation.manifest, evaluation.manifest["sampling"]
    rows = [(card_title(name), shown(score)) for name, score in evaluation.scores.items()]
    return markdown(("score", "value"), rows) + (
        f"\n{manifest['num_images']:,} images ({manifest['label_mode']} labels, seed {manifest['seed']}), "
        f"drawn with `{sampling['solver']}` ({steps_in_words(sampling)}) with guidance "
        f"{sampling['guidance_scale']}, on the features of the extractor `{manifest['extractor']}` "
        f"({manifest['extractor_fingerprint']}), against the reference {manifest['reference_hash']}. "
        "All conditions are in `run/evaluations`."
    )


def shown(score: Score) -> str:
    std = measured_std(score)
    return f"{value(score):.4g}" + ("" if std is None else f" ± {std:.2g}")


def results_of(evaluation: Evaluation) -> list[EvalResult]:
    """The scores for the Hub's metadata, each with its conditions."""
    manifest = evaluation.manifest
    conditions = {name: manifest[name] for name in CARD_CONDITIONS if manifest.get(name) is not None}
    name = f"{Path(manifest.get('reference') or 'images').name} ({manifest['reference_hash']})"
    return [
        EvalResult(
            task_type=TASK,
            dataset_type="reference",
            dataset_name=name,
            metric_type=metric.rpartition("/")[2],
            metric_name=card_title(metric),
            metric_value=value(score),
            metric_args=conditions | ({} if (std := measured_std(score)) is None else {"std": std}),
        )
        for metric, score in evaluation.scores.items()
    ]


def card_title(metric: str) -> str:
    """A metric's title and direction; scores of further extractors are named EXTRACTOR/METRIC."""
    extractor, _, name = metric.rpartition("/")
    if name not in METRICS:
        return metric
    arrow = "↑" if METRICS[name].higher_is_better else "↓"
    return f"{METRICS[name].title}{f' ({extractor})' if extractor else ''} {arrow}"
