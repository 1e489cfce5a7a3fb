"""Conversion of released files: mapped tensors, refused files, and a bit-for-bit round trip."""

from __future__ import annotations

import argparse
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_transdiff.__main__ import main
from lit_transdiff.checkpoints.export import read_export
from lit_transdiff.config import ModelConfig
from lit_transdiff.config.loading import load_run
from lit_transdiff.models.autoencoder import KLAutoencoder
from lit_transdiff.models.ldm import from_diffusers, rename, to_diffusers
from lit_transdiff.models.transdiff import TransDiff
from lit_transdiff.released.convert import convert
from lit_transdiff.released.key_names import our_name, read_shape, released_shapes
from lit_transdiff.sampling.generator import load_generator
from tests.helpers import plain_autoencoder
from tests.helpers.reference import FIXTURES
from tests.helpers.released_files import SMALL, converted_autoencoder, equal, random_state, write_checkpoint

SHAPES: dict[str, Any] = json.loads((FIXTURES / "state_dict_shapes.json").read_text())
KINDS = {
    "one-step": ({}, "ar_pretrain", 256),
    "512": ({"latent_size": 32}, "diffusion_head", 512),
    "MRAR": ({"num_references": 4}, "mrar_finetune", 256),
}


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted_autoencoder(tmp_path_factory.mktemp("released"))


class TestTransDiff:
    @pytest.mark.parametrize(
        "name, config", [("onestep_base_256", {}), ("mrar_base_256", {"num_references": 4})]
    )
    def test_the_layout_is_the_released_one(self, name: str, config: dict[str, int]):
        ours = released_shapes(ModelConfig(**config))
        assert [[key, list(shape)] for key, shape in ours.items()] == [
            list(item) for item in SHAPES[name].items()
        ]

    @pytest.mark.parametrize("size", ["base", "large", "huge"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_every_released_size_is_known_by_its_shapes(self, size: str, kind: str):
        settings, _, resolution = KINDS[kind]
        config = ModelConfig(size=size, **settings)
        shapes = released_shapes(config)
        name = f"{'mrar' if kind == 'MRAR' else 'onestep'}_{size}_{resolution}"
        if name in SHAPES["param_counts"]:
            counts = SHAPES["param_counts"][name]
            sizes = {key: torch.Size(shape).numel() for key, shape in shapes.items()}
            assert (len(shapes), sum(sizes.values())) == (counts["n_keys"], counts["total"])
            assert (
                sum(n for key, n in sizes.items() if key.startswith("diffdecoder")) == counts["diffdecoder"]
            )
        state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
        assert ModelConfig(**read_shape(state)) == config
        with torch.device("meta"):
            own = {key: value.shape for key, value in TransDiff(config).state_dict().items()}
        dead = ("z_proj.weight", "z_proj.bias") if kind != "MRAR" else ()
        assert {our_name(key): torch.Size(shape) for key, shape in shapes.items() if key not in dead} == own

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_there_and_back_is_bit_for_bit(
        self, kind: str, dtype: torch.dtype, tmp_path: Path, autoencoder: Path
    ):
        settings, stage, resolution = KINDS[kind]
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL, **settings), dtype)
        report = convert(file.parent, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        export = read_export(tmp_path / "ours")
        assert (export.run.stage, export.run.data.image_size) == (stage, resolution)
        assert "not converted: optimizer" in report
        assert ("kept aside: z_proj.weight [32, 4]" in report) == (kind != "MRAR")
        said = convert(tmp_path / "ours", tmp_path / "back.pth")
        before, after = (torch.load(f, weights_only=False) for f in (file, tmp_path / "back.pth"))
        assert equal(before["model"], after["model"]) and equal(before["model_ema"], after["model_ema"])
        assert (
            after["epoch"] == 799
            and after["args"].model == "transdiff_large"
            and after["args"].betas == [0.9, 0.95]
        )
        assert "back.pth: model (" in said

    def test_a_converted_model_draws_images_of_its_average(self, tmp_path: Path, autoencoder: Path):
        config = ModelConfig(**SMALL)
        file = write_checkpoint(tmp_path / "released", config)
        assert (
            main(
                [
                    "convert",
                    str(file),
                    str(tmp_path / "ours"),
                    "--autoencoder",
                    str(autoencoder),
                    "--num-heads",
                    "2",
                ]
            )
            == 0
        )
        generator = load_generator(tmp_path / "ours")
        ema = torch.load(file, weights_only=False)["model_ema"]
        assert torch.equal(generator.model.encoder.null_class, ema["fake_latent"])
        raw = load_generator(tmp_path / "ours" / "raw")
        assert (generator.weights, raw.weights) == ("ema", "last")
        assert not torch.equal(raw.model.encoder.null_class, ema["fake_latent"])
        command = [
            "sample",
            "--checkpoint",
            str(tmp_path / "ours"),
            "--classes",
            "6",
            "--per-class",
            "1",
            "sampling.num_steps=1",
        ]
        assert main(command) == 0

    def test_a_file_without_average_or_anything_else(self, tmp_path: Path, autoencoder: Path):
        state = random_state(ModelConfig(**SMALL), 1)
        torch.save(state, tmp_path / "weights.pth")
        report = convert(tmp_path / "weights.pth", tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        assert "model_ema: not in the file" in report and load_generator(tmp_path / "ours").weights == "last"
        convert(tmp_path / "ours", tmp_path / "back.pth")
        back = torch.load(tmp_path / "back.pth")
        assert list(back) == ["model"] and equal(back["model"], state)

    def test_our_own_model_gets_the_released_layout(self, tmp_path: Path, autoencoder: Path):
        """Tensors without a counterpart in our one-step model are filled with zeros, and reported."""
        convert(
            write_checkpoint(tmp_path / "released", ModelConfig(**SMALL)),
            tmp_path / "ours",
            autoencoder=autoencoder,
            num_heads=2,
        )
        (tmp_path / "ours" / "left_over.safetensors").unlink()
        said = convert(tmp_path / "ours", tmp_path / "back.pth")
        assert "made of zeros: z_proj.weight" in said
        assert not torch.load(tmp_path / "back.pth", weights_only=False)["model_ema"]["z_proj.weight"].any()

    def test_every_misfit_is_listed(self, tmp_path: Path, autoencoder: Path):
        state = random_state(ModelConfig(**SMALL), 1)
        del state["encoder_norm.bias"], state["diffdecoder.net.res_blocks.0.attn2.wk.weight"]
        state |= {"extra.weight": torch.zeros(3), "z_proj_ln.bias": torch.zeros(5)}
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), model=state, model_ema=None)
        with pytest.raises(ValueError) as error:
            convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        for part in (
            "model: the checkpoint does not fit",
            "missing: encoder_norm.bias [32]",
            "missing: diffdecoder.net.res_blocks.0.attn2.wk.weight [32, 32]",
            "unexpected: extra.weight [3]",
            "of another shape: z_proj_ln.bias [5], expected [32]",
        ):
            assert part in str(error.value)
        assert not (tmp_path / "ours").exists()

    def test_code_in_a_file_is_not_run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
        class Evil:
            def __reduce__(self) -> tuple[Any, ...]:
                return Path.touch, (tmp_path / "ran",)

        torch.save({"model": {}, "args": Evil()}, tmp_path / "evil.pth", pickle_module=pickle)
        assert main(["convert", str(tmp_path / "evil.pth"), str(tmp_path / "ours")]) == 2
        said = capsys.readouterr().err
        assert "without running code from it: it asks for " in said and "weights_only" not in said
        assert not (tmp_path / "ran").exists() and not (tmp_path / "ours").exists()

    def test_parameters_as_the_released_training_saves_its_average(self, tmp_path: Path, autoencoder: Path):
        """It puts trainable parameters among the tensors of ``model_ema``, which may be bfloat16."""
        state = {
            k: torch.nn.Parameter(v.bfloat16()) for k, v in random_state(ModelConfig(**SMALL), 2).items()
        }
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), model_ema=state)
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        convert(tmp_path / "ours", tmp_path / "back.pth")
        back = torch.load(tmp_path / "back.pth", weights_only=False)["model_ema"]
        assert equal(back, {key: value.data for key, value in state.items()})

    @pytest.mark.parametrize("kind", [argparse.Namespace, dict])
    def test_the_arguments_of_the_training_come_back(self, tmp_path: Path, autoencoder: Path, kind: type):
        args = {"resume": None, "bf16": True, "lr": 1e-4, "betas": [0.9, 0.95], "more": {"a": None}}
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), args=kind(**args))
        convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        convert(tmp_path / "ours", tmp_path / "back.pth")
        assert vars(torch.load(tmp_path / "back.pth", weights_only=False)["args"]) == args

    def test_arguments_that_are_none_are_in_the_report(self, tmp_path: Path, autoencoder: Path):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL), args=["--lr", "1e-4"])
        assert "not converted: args" in convert(file, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)

    @pytest.mark.parametrize(
        "content, message",
        [
            ({"model": [1, 2]}, "model: got 'list'; allowed: a state dict"),
            ({"model": None}, "model: got 'NoneType'"),
            ({"model_ema": {}}, r"entries: got \['model_ema'\]; allowed: model"),
            ({"note": "text"}, "entries that are not tensors: note: str"),
            ({"fake_latent": torch.zeros(32)}, r"wrong dimensions: fake_latent \[32\]"),
            ({"fake_latent": torch.zeros(1, 0)}, r"empty: fake_latent \[1, 0\]"),
            ({"mask_token": torch.zeros(1, 100, 32)}, "mask_token: got 100 tokens"),
            ({"encoder_pos_embed_learned": torch.zeros(1, 200, 32)}, r"model\.num_class_tokens: got -56"),
        ],
        ids=str,
    )
    def test_files_that_are_no_such_checkpoint(
        self, content: Any, message: str, tmp_path: Path, autoencoder: Path
    ):
        whole = (
            content
            if content.keys() & {"model", "model_ema"}
            else {"model": random_state(ModelConfig(**SMALL), 1) | content}
        )
        torch.save(whole, tmp_path / "odd.pth")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "odd.pth", tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        assert not (tmp_path / "ours").exists()

    def test_a_folder_of_numbered_checkpoints_names_them(self, tmp_path: Path, autoencoder: Path):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
        file.rename(file.with_name("checkpoint-799.pth"))
        with pytest.raises(
            ValueError,
            match=r"the file itself, as the folder has no checkpoint-last\.pth: checkpoint-799\.pth",
        ):
            convert(file.parent, tmp_path / "ours", autoencoder=autoencoder, num_heads=2)
        with pytest.raises(FileNotFoundError, match="holds no trained model"):
            convert(tmp_path, tmp_path / "ours")

    @pytest.mark.parametrize(
        "changes, message",
        [
            ({"num_heads": None}, r"model\.num_heads: no known size has width 32"),
            ({"autoencoder": None}, "autoencoder: got nothing"),
            ({"dest": "released"}, "dest: .*does not exist yet"),
        ],
    )
    def test_what_is_missing_is_asked_for(
        self, changes: dict[str, Any], message: str, tmp_path: Path, autoencoder: Path
    ):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
        options = {"autoencoder": autoencoder, "num_heads": 2, "dest": "ours"} | changes
        with pytest.raises(ValueError, match=message):
            convert(file, tmp_path / options.pop("dest"), **options)

    def test_a_recipe_gives_the_rest_and_must_agree(self, tmp_path: Path, autoencoder: Path):
        file = write_checkpoint(tmp_path / "released", ModelConfig(**SMALL))
        recipe = tmp_path / "recipe.yaml"
        text = (
            "# x\nmodel: {width: 32, num_heads: 2, encoder_blocks: 2, decoder_blocks: 1, num_classes: 7, "
            "latent_channels: 4}\n"
        )
        recipe.write_text(text + "sampling: {guidance_scale: 1.3, drift_scale: 0.89}\n")
        convert(file, tmp_path / "ours", autoencoder=autoencoder, recipe=load_run(recipe))
        assert read_export(tmp_path / "ours").run.sampling.drift_scale == 0.89
        with pytest.raises(
            ValueError, match=r"image size of latents of 16 x 16: got 256; allowed: data\.image_size=512"
        ):
            convert(
                file,
                tmp_path / "again",
                autoencoder=autoencoder,
                recipe=load_run(recipe, ["data.image_size=512"]),
            )
        other = load_run(recipe, ["model.num_classes=1000", "model.decoder_blocks=2"])
        with pytest.raises(
            ValueError,
            match=r"model\.decoder_blocks: 1 in the checkpoint, 2 in the recipe; model\.num_classes: 7",
        ):
            convert(file, tmp_path / "again", autoencoder=autoencoder, recipe=other)

    def test_the_layout_holds_no_other_shapes(self):
        for settings in (dict(patch_size=2), dict(num_references=4, latent_size=32)):
            with pytest.raises(ValueError, match="the released layout has"):
                released_shapes(ModelConfig(**settings))


class TestAutoencoder:
    def test_every_key_of_kl16_has_a_name_and_a_way_back(self):
        names = {key: rename(key, 5) for key in SHAPES["vae_kl16"]}
        assert len(set(names.values())) == 312
        assert all(rename(name, 5, back=True) == key for key, name in names.items())

    @pytest.mark.numeric
    @pytest.mark.usefixtures("float64")
    @torch.no_grad()
    def test_it_encodes_and_decodes_as_the_plain_one(self):
        state = plain_autoencoder.make()
        network, dropped = KLAutoencoder.from_ldm(
            state | {"loss.logvar": torch.zeros(())}, scaling_factor=0.2325
        )
        assert dropped == ["loss.logvar"]
        network.freeze()
        images = torch.rand(2, 3, 32, 32) * 2 - 1
        moments = plain_autoencoder.encode(state, images)
        torch.testing.assert_close(network.encode(images), moments)
        latents = moments[:, :4]
        torch.testing.assert_close(network.sample(moments), (latents * 0.2325).float())
        plainly = plain_autoencoder.decode(state, latents)
        # the scale is float32
        torch.testing.assert_close(network.reconstruct(latents * 0.2325), plainly, rtol=1e-5, atol=1e-5)

    def test_there_and_back_is_bit_for_bit(self, tmp_path: Path):
        state = plain_autoencoder.make()
        assert {k: v.shape for k, v in from_diffusers(to_diffusers(state).state).items()} == {
            k: v.shape for k, v in state.items()
        }
        torch.save({"model": state, "epoch": 3}, tmp_path / "kl.ckpt")
        assert "latents = samples x 0.2325, 4 channels, 1/4 of the size" in convert(
            tmp_path / "kl.ckpt", tmp_path / "folder"
        )
        convert(tmp_path / "folder", tmp_path / "back.ckpt")
        back = torch.load(tmp_path / "back.ckpt")["model"]
        assert sorted(back) == sorted(state) and all(torch.equal(back[key], state[key]) for key in state)

    def test_the_released_shapes_make_the_released_network(self):
        """All 312 tensors of kl16 at their full size, on the meta device."""
        state = {key: torch.empty(shape, device="meta") for key, shape in SHAPES["vae_kl16"].items()}
        with torch.device("meta"):
            network, _ = KLAutoencoder.from_ldm(state, 0.2325)
        parameters = sum(p.numel() for p in network.model.parameters())
        assert parameters == SHAPES["param_counts"]["vae_kl16"]["total"]
        assert (network.downsampling, network.latent_channels) == (16, 16)

    def test_what_does_not_fit_is_listed(self, tmp_path: Path):
        state = plain_autoencoder.make()
        del state["decoder.up.1.upsample.conv.bias"]
        torch.save({"model": state | {"strange.weight": torch.zeros(1)}}, tmp_path / "kl.ckpt")
        with pytest.raises(ValueError, match=r"unexpected: strange\.weight"):
            convert(tmp_path / "kl.ckpt", tmp_path / "folder")
        torch.save({"model": state}, tmp_path / "kl.ckpt")
        with pytest.raises(ValueError, match=r"missing: decoder\.up\.1\.upsample\.conv\.bias \[32\]"):
            convert(tmp_path / "kl.ckpt", tmp_path / "folder")
        assert not (tmp_path / "folder").exists()


def test_something_else_is_refused(tmp_path: Path):
    torch.save({"model": {"weight": torch.zeros(1)}}, tmp_path / "other.pth")
    with pytest.raises(
        ValueError, match="an autoencoder of latent diffusion, or a checkpoint of transdiff, sit, "
    ):
        convert(tmp_path / "other.pth", tmp_path / "ours")
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(ValueError, match="not a checkpoint that can be read"):
        convert(tmp_path / "text.pth", tmp_path / "ours")
