"""A trained run as a pipeline of diffusers: ``TransDiffPipeline.from_pretrained("runs/x")``.

diffusers itself opens an export, too: ``DiffusionPipeline.from_pretrained(FOLDER, trust_remote_code=True)``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from einops import rearrange
from torch import nn

from lit_transdiff.base.hub import SCHEME, hub_place, is_on_hub
from lit_transdiff.checkpoints.export import earlier_files, read_info
from lit_transdiff.checkpoints.portable import INFO, portable
from lit_transdiff.config import SamplingConfig, expanded, require, require_known, shipped, unknown
from lit_transdiff.config.classes import choose_classes
from lit_transdiff.config.paths import export_folder
from lit_transdiff.config.sampling import Precision
from lit_transdiff.config.targets import contents, refuse_foreign
from lit_transdiff.data.pixels import to_bytes
from lit_transdiff.sampling.draw import rows_of_classes
from lit_transdiff.sampling.generator import Generator, load_generator
from lit_transdiff.sampling.pictures import as_image

# dtype -> sampling.precision
PRECISIONS: dict[Any, Precision | None] = {None: None, torch.float32: None, torch.bfloat16: "bf16"}
IN_DIFFUSERS = {"num_inference_steps": "num_steps"}  # names of settings there and here
OUTPUTS = ("pil", "pt", "np")


class TrainedRun(nn.Module):
    """The networks of a trained run as one module, which diffusers loads and moves to a device."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.network, self.autoencoder = generator.model, generator.autoencoder
        self.made, self.device_made = generator, generator.device

    @classmethod
    def from_pretrained(cls, place: str | os.PathLike[str], **options: Any) -> TrainedRun:
        """The run of a run folder or export folder, or of the folder ``run`` in one, as diffusers asks it.

        ``torch_dtype`` chooses the precision of sampling; diffusers' other options are about other layouts.
        """
        place = str(place)
        if Path(place).name == "run" and Path(place, "trained_run.py").is_file():
            place = str(Path(place).parent)
        dtype = options.get("torch_dtype", options.get("dtype"))
        require(dtype in PRECISIONS, "torch_dtype", dtype, "float32 or bfloat16")
        require(options.get("device_map") is None, "device_map", options.get("device_map"), "None; use .to()")
        return cls(load_generator(place, precision=PRECISIONS[dtype]))

    @property
    def device(self) -> torch.device:
        return self.made.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights; sampling has a precision of its own."""
        return next(self.network.parameters()).dtype

    @property
    def generator(self) -> Generator:
        """The generator on the device where the networks are now."""
        allowed = "float32, in which the weights stay; for bfloat16 call with precision='bf16'"
        require(self.dtype == torch.float32, "dtype", self.dtype, allowed)
        if self.made.device != self.device_made:  # its kept tensors are on the other device
            self.made, self.device_made = replace(self.made), self.made.device
        return self.made

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the export once more, with its autoencoder, to an empty folder."""
        there = contents(Path(folder))
        if there:
            refuse_foreign(Path(folder), there, "this call")
        export, run = export_folder(self.made.checkpoint), self.made.run
        files = portable(export, earlier_files(export), read_info(export / INFO), run.autoencoder)
        for name, content in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                shutil.copyfile(content, path)


class TransDiffPipeline(DiffusionPipeline):
    """Draws the images of a trained run, the same ones as ``lit-transdiff sample`` for the same seed."""

    run: TrainedRun

    def __init__(self, run: TrainedRun) -> None:
        super().__init__()
        self.register_modules(run=run)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Any
    ) -> TransDiffPipeline:
        """The pipeline of a run folder, an export folder, or a repository (OWNER/NAME, or hf://...).

        Options are ``revision``, of a repository, and ``torch_dtype``.
        """
        path = shipped(expanded(str(pretrained_model_name_or_path), "place"))
        revision = options.pop("revision", None)
        if not is_on_hub(path) and not os.path.isdir(path) and path.count("/") == 1:
            path = f"{SCHEME}{path}"
        if revision is not None:
            require(is_on_hub(path), "revision", revision, "None for a folder")
            path = str(replace(hub_place(path), revision=revision))
        return cls(TrainedRun.from_pretrained(path, **options))

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], *options: Any, **named_options: Any
    ) -> None:
        """Write the export once more to an empty folder, from which ``from_pretrained`` loads it."""
        wanted = named_options.get("push_to_hub", False)
        require(not wanted, "push_to_hub", wanted, "False; lit_transdiff.push uploads")
        self.run.save_pretrained(save_directory)

    @torch.no_grad()
    def __call__(
        self,
        classes: str | int | Sequence[str | int] | None = None,
        per_class: int = 8,
        seed: int = 0,
        output_type: str = "pil",
        return_dict: bool = True,
        **settings: Any,
    ) -> ImagePipelineOutput | tuple[Any]:
        """``per_class`` images of each of the ``classes`` (names or numbers; default: the first ten).

        ``settings`` are those of ``sampling``, such as ``guidance_scale`` and ``solver``;
        ``num_inference_steps`` is another name of ``num_steps``. ``output_type`` is ``pil``, or ``pt`` or
        ``np`` for numbers from 0 to 1 (``pt`` [N, C, H, W], ``np`` [N, H, W, C]).
        """
        require_known("output_type", output_type, OUTPUTS)
        generator = self.run.generator
        sampling = changed_sampling(generator.run.sampling, settings)
        wanted = [classes] if isinstance(classes, str | int) else classes
        text = ",".join(f"#{c}" if isinstance(c, int) else c for c in wanted or ())
        chosen = choose_classes(text or None, generator.names, "classes")
        rows = rows_of_classes(generator.at(sampling.precision), chosen, per_class, sampling, seed)
        images = rearrange(rows[:, :, -1], "k n c h w -> (k n) c h w")
        result: Any = (images + 1) / 2
        if output_type == "pil":
            result = [as_image(rearrange(image, "c h w -> h w c")) for image in to_bytes(images)]
        elif output_type == "np":
            result = rearrange(result, "n c h w -> n h w c").numpy()
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def changed_sampling(sampling: SamplingConfig, settings: dict[str, Any]) -> SamplingConfig:
    """The sampler with changed settings. Raises ``ValueError`` for an unknown one."""
    given = {IN_DIFFUSERS.get(name, name): value for name, value in settings.items()}
    for name in given:
        if name not in asdict(sampling):
            raise unknown("setting of sampling", name, [*asdict(sampling), *IN_DIFFUSERS])
    return replace(sampling, **given)
