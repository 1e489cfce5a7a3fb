"""Released files that are damaged, incomplete or odd, and options that do not fit them, are refused with what
is wrong.
"""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lit_transdiff.__main__ import main
from lit_transdiff.config import SIZES, ModelConfig, RunConfig
from lit_transdiff.models.autoencoder import KLAutoencoder
from lit_transdiff.released.convert import LATENT_SCALE, convert
from lit_transdiff.released.files import state_dict
from tests.helpers import plain_autoencoder
from tests.helpers.released_files import SMALL, converted_autoencoder, equal, random_state, write_checkpoint
from tests.helpers.small import without_checksums


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_autoencoder(tmp_path_factory.mktemp("autoencoder"))


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda v: v * float("nan"), "fake_latent: NaN or Inf"),
        (lambda v: v.to(torch.int8), "fake_latent: int8"),
        (lambda v: v.to(torch.complex64), "fake_latent: complex64"),
        (lambda v: v.to_sparse(), "fake_latent: sparse_coo"),
        (lambda v: (v * float("nan")).to(torch.float8_e5m2), "fake_latent: NaN or Inf"),
    ],
    ids=["nan", "int8", "complex", "sparse", "float8"],
)
@pytest.mark.parametrize("name", ["model", "model_ema"])
def test_tensors_that_are_no_weights_are_listed(
    wrong: Any, message: str, name: str, tmp_path: Path, autoencoder: Path
):
    state = random_state(ModelConfig(**SMALL), 1)
    state["fake_latent"] = wrong(state["fake_latent"])
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), **{name: state})
    with pytest.raises(ValueError, match=f"{file}: {name}: entries that are not weights: {message}$"):
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
    assert not (tmp_path / "ours").exists()


@pytest.mark.parametrize(
    "wrapped", ["module.{}", "_orig_mod.{}", "module._orig_mod.{}", "_orig_mod.module.{}"]
)
def test_what_wrappers_add_to_names_is_taken_off_and_told(
    wrapped: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    state = {"a.weight": torch.zeros(2), "module_list.0": torch.ones(1)}
    with caplog.at_level("INFO", logger="lit_transdiff"):
        found = state_dict(
            {wrapped.format(key): value for key, value in state.items()}, "model", tmp_path / "x.pth"
        )
    assert list(found) == list(state) and all(found[key] is state[key] for key in state)
    assert f"{wrapped.format('a.weight')} is a.weight" in caplog.text


def test_blocks_that_were_compiled_one_by_one_and_names_that_only_look_so(tmp_path: Path):
    one = torch.zeros(1)
    assert list(state_dict({"blocks.0._orig_mod.w": one, "head": one}, "model", tmp_path)) == [
        "blocks.0.w",
        "head",
    ]
    assert list(state_dict({"module.w": one, "head": one}, "model", tmp_path)) == ["module.w", "head"]
    with pytest.raises(
        ValueError, match=r"model: got '_orig_mod\.w'; allowed: names that differ without _orig_mod"
    ):
        state_dict({"_orig_mod.w": one, "w": one}, "model", tmp_path)


@pytest.mark.parametrize(
    "content",
    [Path("x"), {"model": {"a": print}}, {"model": np.float64(3)}, {"model": torch.nn.Linear(1, 1)}],
)
def test_a_file_that_runs_code_is_refused_without_advice_to_run_it(content: Any, tmp_path: Path):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"without running code from it: .*save its tensors alone") as error:
        convert(tmp_path / "x.pth", tmp_path / "ours")
    said = str(error.value)
    assert (
        "weights_only" not in said and "trust" not in said and "two options" not in said and "\n" not in said
    )


def test_a_damaged_file_is_refused_by_its_checksums(tmp_path: Path, autoencoder: Path):
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
    with zipfile.ZipFile(file) as archive:
        part = archive.getinfo("checkpoint-last/data/3")
    content = bytearray(file.read_bytes())
    content[part.header_offset + 200] ^= 255
    file.write_bytes(content)
    with pytest.raises(
        ValueError, match=rf"{file}: .*checkpoint-last/data/3 in it differs from its checksum"
    ):
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
    assert not (tmp_path / "ours").exists()


def test_every_damaged_file_is_named(tmp_path: Path):
    """Any error of torch or zipfile becomes one that names the file."""
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
    whole, generator = file.read_bytes(), np.random.default_rng(0)
    torch.save({"model": {"a": torch.zeros(3)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for original in (whole, (tmp_path / "old.pth").read_bytes()):
        for _ in range(30):
            content = bytearray(original)
            for place in generator.integers(len(content), size=20).tolist():
                content[place] ^= 255
            file.write_bytes(content)
            with pytest.raises(ValueError, match=str(file)):
                convert(file, tmp_path / "ours")


def test_names_that_share_a_tensor_and_an_epoch_that_is_one(tmp_path: Path, autoencoder: Path):
    state = random_state(ModelConfig(**SMALL), 1)
    state["encoder_blocks.0.norm2.weight"] = state["encoder_blocks.0.norm1.weight"]
    changes = {"model": state, "model_ema": state, "epoch": torch.tensor(12)}
    file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), **changes)
    convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
    convert(tmp_path / "ours", tmp_path / "back.pth")
    back = torch.load(tmp_path / "back.pth", weights_only=False)
    assert back["epoch"] == 12 and equal(back["model"], state) and equal(back["model_ema"], state)
    for epoch in (1.5, float("inf"), "last", torch.zeros(2)):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), epoch=epoch)
        with pytest.raises(ValueError, match=r"epoch: got .*; allowed: a whole number"):
            convert(file, tmp_path / "again", autoencoder=autoencoder, num_heads=2)


VAE = plain_autoencoder.make(channels=(32, 32, 32))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"decoder.conv_out.weight": None}, "missing: decoder.conv_out.weight"),
        ({"encoder.down.1.": None}, "missing: encoder.down.1.block.0.conv2.weight"),
        ({"encoder.conv_in.weight": torch.zeros(3)}, "no convolution: encoder.conv_in.weight [3]"),
        ({"post_quant_conv.weight": torch.zeros(())}, "no convolution: post_quant_conv.weight []"),
        ({"encoder.down.2.attn.0.q.weight": None}, "missing: encoder.down.2.attn.0.q.weight [32, 32, 1, 1]"),
        ({"decoder.mid.attn_1.norm.bias": None}, "missing: decoder.mid.attn_1.norm.bias [32]"),
        (
            {"encoder.mid.attn_1.q.weight": torch.zeros(32, 32, 2, 2)},
            "of another shape: encoder.mid.attn_1.q.weight [32, 32, 2, 2], expected [32, 32, 1, 1]",
        ),
        (
            {"encoder.down.0.block.5.conv1.weight": torch.zeros(1)},
            "unexpected: encoder.down.0.block.5.conv1.weight [1]",
        ),
        ({"encoder.down.9999999999.x": torch.zeros(1)}, "unexpected: encoder.down.9999999999.x [1]"),
    ],
)
def test_an_autoencoder_that_does_not_fit_is_told_by_its_own_names(
    changes: dict[str, Any], message: str, tmp_path: Path
):
    """``None`` removes all keys with this prefix; only wrong keys are listed."""
    gone = tuple(key for key, value in changes.items() if value is None)
    state = {key: value for key, value in VAE.items() if not key.startswith(gone)} if gone else VAE | changes
    torch.save({"model": state}, tmp_path / "kl.ckpt")
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "kl.ckpt", tmp_path / "folder")
    assert str(error.value) == f"the checkpoint does not fit: {message}"


def test_a_level_with_fewer_blocks_lists_its_own_keys(tmp_path: Path):
    torch.save(
        {k: v for k, v in VAE.items() if not k.startswith("encoder.down.0.block.1.")}, tmp_path / "kl.ckpt"
    )
    with pytest.raises(ValueError) as error:
        convert(tmp_path / "kl.ckpt", tmp_path / "folder")
    listed = str(error.value).removeprefix("the checkpoint does not fit: ").split("; ")
    assert all(part.startswith("missing: encoder.down.0.block.1.") for part in listed)
    torch.save(plain_autoencoder.make(channels=(24, 24)), tmp_path / "kl.ckpt")
    with pytest.raises(ValueError, match=r"channels of the levels: got \(24, 24\); allowed: multiples of 32"):
        convert(tmp_path / "kl.ckpt", tmp_path / "folder")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_autoencoder_keeps_its_type(dtype: torch.dtype, tmp_path: Path):
    state = {key: value.to(dtype) for key, value in VAE.items()}
    torch.save({"model": state}, tmp_path / "kl.ckpt")
    assert f"weights: {dtype} in the file, stored as {dtype}" in convert(
        tmp_path / "kl.ckpt", tmp_path / "folder"
    )
    (weights,) = (load_file(file) for file in (tmp_path / "folder").glob("*.safetensors"))
    assert {value.dtype for value in weights.values()} == {dtype}
    assert next(KLAutoencoder.load(tmp_path / "folder", 3).parameters()).dtype == torch.float32
    convert(tmp_path / "folder", tmp_path / "back.ckpt")
    back = torch.load(tmp_path / "back.ckpt")["model"]
    assert all(back[key].dtype == dtype and torch.equal(back[key], value) for key, value in state.items())


def test_weights_of_an_autoencoder_that_become_float32_are_reported(tmp_path: Path):
    torch.save(VAE | {"quant_conv.bias": VAE["quant_conv.bias"].double()}, tmp_path / "kl.ckpt")
    said = convert(tmp_path / "kl.ckpt", tmp_path / "folder")
    assert "weights: torch.float32, torch.float64 in the file, stored as torch.float32" in said
    with pytest.raises(
        ValueError, match=r"dest: got .*back\.txt'; allowed: a file name ending in \.ckpt or \.pth"
    ):
        convert(tmp_path / "folder", tmp_path / "back.txt")


class TestOptions:
    @pytest.mark.parametrize("heads", [1, 16])
    def test_heads_that_contradict_a_known_size(self, heads: int, tmp_path: Path, autoencoder: Path):
        file = write_checkpoint(
            tmp_path / "released", ModelConfig(**SIZES["test"], num_classes=7, latent_channels=4)
        )
        with pytest.raises(
            ValueError,
            match=rf"model\.num_heads: got {heads}; allowed: 2, as the checkpoint is of size 'test'",
        ):
            convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=heads)
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)

    def test_no_heads_at_all(self, tmp_path: Path, autoencoder: Path):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
        with pytest.raises(ValueError, match=r"model\.num_heads: got 0; allowed: an integer of at least 1"):
            convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=0)

    def test_settings_without_a_recipe(
        self, tmp_path: Path, autoencoder: Path, capsys: pytest.CaptureFixture[str]
    ):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
        command = [
            "convert",
            str(file),
            str(tmp_path / "ours"),
            "--autoencoder",
            str(autoencoder),
            "--num-heads",
            "2",
        ]
        assert main([*command, "sampling.num_steps=7"]) == 2
        assert (
            "override: got ['sampling.num_steps=7']; allowed: only with --recipe" in capsys.readouterr().err
        )
        assert not (tmp_path / "ours").exists()

    @pytest.mark.parametrize("factor", [0.0, -1.0, float("nan"), float("inf")])
    def test_a_scaling_factor_that_is_none(self, factor: float, tmp_path: Path):
        torch.save(VAE, tmp_path / "kl.ckpt")
        with pytest.raises(ValueError, match=r"scaling_factor: got .*; allowed: a finite number above 0"):
            convert(tmp_path / "kl.ckpt", tmp_path / "folder", scaling_factor=factor)
        assert not (tmp_path / "folder").exists()

    def test_options_without_effect(self, tmp_path: Path, autoencoder: Path):
        torch.save(VAE, tmp_path / "kl.ckpt")
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
        every: dict[str, Any] = {
            "autoencoder": autoencoder,
            "recipe": RunConfig(),
            "num_heads": 2,
            "scaling_factor": LATENT_SCALE,
        }
        for source, effective in (
            (tmp_path / "kl.ckpt", ["scaling_factor"]),
            (file, ["autoencoder", "num_heads", "recipe"]),
            (autoencoder, []),
        ):
            for name in every.keys() - set(effective):
                allowed = ", ".join(effective) or "none"
                with pytest.raises(
                    ValueError, match=rf"options: got \['{name}'\]; allowed: for .*{source}.*: {allowed}\.$"
                ):
                    convert(source, tmp_path / "out", **{name: every[name]})
        assert not (tmp_path / "out").exists()


class TestExports:
    """A trained model whose files are damaged or do not belong together."""

    @pytest.fixture(scope="class")
    def trained(self, tmp_path_factory: pytest.TempPathFactory, autoencoder: Path) -> Path:
        folder = tmp_path_factory.mktemp("trained")
        file = write_checkpoint(folder / "released", ModelConfig(**SMALL))
        convert(file, folder / "model", autoencoder=autoencoder, num_heads=2)
        return folder / "model"

    @pytest.mark.parametrize(
        "name, change, message",
        [
            ("model.safetensors", lambda b: b[:5000], "model.safetensors is not a whole safetensors file"),
            ("model.safetensors", lambda b: b[:-1], "model.safetensors is not a whole safetensors file"),
            ("model.safetensors", lambda b: b"", "model.safetensors is not a whole safetensors file"),
            ("export.json", lambda b: b"{", "export.json is damaged: it holds no JSON"),
            ("export.json", lambda b: b"\xff", "export.json is damaged: it holds no JSON"),
            ("export.json", lambda b: b"{}", "export.json: content: got {}; allowed: what an export says"),
            ("export.json", lambda b: b"[]", "export.json: content: got []"),
            ("export.json", None, "export.json does not exist"),
            ("config.yaml", None, "config.yaml does not exist"),
            (
                "config.yaml",
                lambda b: b.replace(b"width: 32", b"width: 64"),
                "does not belong to config.yaml: the checkpoint does not fit: of another shape: "
                "encoder.null_class",
            ),
            (
                "config.yaml",
                lambda b: b.replace(b"encoder_blocks: 2", b"encoder_blocks: 3"),
                "does not belong to config.yaml: the checkpoint does not fit: missing: encoder.blocks.2.",
            ),
        ],
    )
    def test_the_file_is_named(
        self,
        name: str,
        change: Any,
        message: str,
        trained: Path,
        tmp_path: Path,
        capsys: pytest.CaptureFixture[str],
    ):
        shutil.copytree(trained, tmp_path / "model")
        without_checksums(tmp_path / "model" / "export.json")
        file = tmp_path / "model" / name
        file.unlink() if change is None else file.write_bytes(change(file.read_bytes()))
        assert (
            main(
                ["sample", "--checkpoint", str(tmp_path / "model"), "--classes", "0", "sampling.num_steps=1"]
            )
            == 2
        )
        said = capsys.readouterr().err
        assert message in said and str(tmp_path / "model") in said

    def test_an_autoencoder_with_damaged_files(self, autoencoder: Path, tmp_path: Path):
        for name, content in (("diffusion_pytorch_model.safetensors", b"cut"), ("config.json", b"{")):
            folder = tmp_path / name
            shutil.copytree(autoencoder, folder)
            (folder / name).write_bytes(content)
            with pytest.raises(
                ValueError, match=rf"{folder / name} is damaged: its CRC-32 is .*, in checksums.json it is "
            ):
                KLAutoencoder.load(folder, 3)
            (folder / "checksums.json").unlink()
            with pytest.raises(
                ValueError, match=rf"{folder}.*(the weights are damaged|is damaged: it holds no JSON)"
            ):
                KLAutoencoder.load(folder, 3)
