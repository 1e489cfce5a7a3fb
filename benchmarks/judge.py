"""Which distortions do judge and classifier see? Frechet distances of real images, each changed alike.

    python benchmarks/judge.py [JUDGE.safetensors]

The images are 2,000 of the bundled training set, the reference is the 2,000 bundled evaluation images.
The judge was trained to name noise, blur, lines and mixed squares at random strengths, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from lit_transdiff.config.loading import load_run
from lit_transdiff.evaluation.features import FeatureExtractor, load_extractor
from lit_transdiff.evaluation.moments import Gaussian, frechet, gaussian_of
from lit_transdiff.evaluation.prepare import batches_of
from lit_transdiff.models.autoencoder import load_autoencoder
from lit_transdiff.stages.judge import blur, noise, patch, scratches

ROOT = Path(__file__).parents[1]
DATA = ROOT / "data/fashion"
COUNT = 2000


def images_of(folder: str) -> Tensor:
    """The first 2,000 images of a bundled set, [2000, 1, 32, 32]."""
    run = load_run(str(ROOT / "experiments/fashion/ar_pretrain.yaml"))
    batches = [batch.values[:, 0] for batch in batches_of(str(DATA / folder), run.data, 200)]
    return torch.cat(batches)[:COUNT]


def changed(images: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Each distortion and the images with it."""
    autoencoder = load_autoencoder("kl", str(DATA / "autoencoder"), 1)
    latents = torch.cat([autoencoder.sample(autoencoder.encode(batch)) for batch in images.split(200)])
    half = torch.full((len(images), 1, 1, 1), 0.5)

    def decoded(x: Tensor) -> Tensor:
        return torch.cat([autoencoder.decode(batch) for batch in x.split(200)])

    yield "unchanged", images
    yield "noise of standard deviation 0.1", noise(images, half)
    yield "half the mean of 3 x 3 pixels", blur(images, half)
    yield "two lines, darker by 0.4", scratches(images, half)
    yield "a square mixed with another image's", patch(images, half)
    yield "reconstructed by the autoencoder", decoded(latents)
    yield "noise of 0.2 in the latents", decoded(latents + 0.2 * torch.randn_like(latents))
    yield "noise of 0.5 in the latents", decoded(latents + 0.5 * torch.randn_like(latents))
    yield "moved by two pixels", images.roll(2, 3)


def gaussian(extractor: FeatureExtractor, images: Tensor) -> Gaussian:
    return gaussian_of([extractor(batch).features for batch in images.split(200)])


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    files = {"judge": sys.argv[1] if len(sys.argv) > 1 else DATA / "judge.safetensors"}
    files["classifier"] = DATA / "classifier.safetensors"
    extractors = {name: load_extractor(name, file) for name, file in files.items()}
    references = {
        name: gaussian(extractor, images_of("evaluation")) for name, extractor in extractors.items()
    }
    print("| images | by the judge | by the classifier |\n|---|---|---|")
    for name, images in changed(images_of("train")):
        scores = [
            frechet(gaussian(extractors[who], images.clamp(-1, 1)), references[who])
            for who in ("judge", "classifier")
        ]
        print(f"| {name} | {scores[0]:.3f} | {scores[1]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
