"""Settings are read as intended, and impossible ones are refused by name."""

import dataclasses
from pathlib import Path

import pytest

from lit_transdiff.__main__ import main
from lit_transdiff.config import (
    EFFECTS,
    NESTED,
    PRESETS,
    SIZES,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    check_effects,
)
from lit_transdiff.config.loading import load_run, override, parse_overrides, preset, run_from, save_yaml
from lit_transdiff.sampling.loop import check_sampling


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def test_defaults_size_base_file_and_overrides_stand_in_this_order(tmp_path: Path):
    write(tmp_path, "base.yaml", "model: {size: nano, num_heads: 2}\noptimizer: {lr: 1.0e-3, eps: 1.0e-6}\n")
    path = write(tmp_path, "run.yaml", "base: base.yaml\noptimizer: {lr: 2.0e-3}\n")
    run = load_run(path, ["optimizer.weight_decay=0.1", "model.decoder_blocks=7"])
    assert (
        run.model.width == SIZES["nano"]["width"]
        and run.model.num_heads == 2
        and run.model.decoder_blocks == 7
    )
    assert (run.optimizer.lr, run.optimizer.eps, run.optimizer.weight_decay) == (2e-3, 1e-6, 0.1)
    assert run.optimizer.betas == RunConfig().optimizer.betas


@pytest.mark.parametrize("size", SIZES)
def test_a_size_is_the_same_in_python_and_in_yaml(size: str):
    model = ModelConfig(size=size)
    assert {name: getattr(model, name) for name in SIZES[size]} == SIZES[size]
    assert run_from({"model": {"size": size}}).model == model
    assert ModelConfig(size=size, encoder_blocks=3) == dataclasses.replace(model, encoder_blocks=3)
    assert all(type(getattr(model, name)) is int for name in SIZES[size])


def test_a_size_that_is_no_row_and_a_number_of_zero_are_refused_in_python():
    with pytest.raises(ValueError, match=r"model\.size: 'larg' is not known\. Did you mean 'large'"):
        ModelConfig(size="larg")
    with pytest.raises(ValueError, match=r"model\.width: got 0"):
        ModelConfig(width=0)


def test_the_numbers_of_a_size_can_be_named_in_the_file(tmp_path: Path):
    path = write(tmp_path, "run.yaml", "model: {size: nano, num_class_tokens: '${model.num_heads}'}")
    assert load_run(path).model.num_class_tokens == SIZES["nano"]["num_heads"]


def test_a_saved_configuration_reads_back_equal(tmp_path: Path):
    run = run_from(
        {
            "model": {"size": "test"},
            "sampling": {"guidance_interval": [0.1, 0.9]},
            "tracking": {"tags": ["a"]},
        }
    )
    save_yaml(run, tmp_path / "config.yaml")
    assert load_run(tmp_path / "config.yaml") == run


def test_names_inside_the_file_refer_to_each_other(tmp_path: Path):
    path = write(tmp_path, "run.yaml", "output_dir: here\ninit_from: ${output_dir}/other\n")
    assert load_run(path).init_from == "here/other"
    assert load_run(path, ["output_dir=there"]).init_from == "there/other"


def test_overrides_of_every_kind():
    given = parse_overrides(["a.b=1", "a.c=None", "d=[1,2]", "e=x=y", "f={width: 3}"])
    assert given == {"a": {"b": 1, "c": None}, "d": [1, 2], "e": "x=y", "f": {"width": 3}}


INIT = ("init_from", "init_positions", "init_classes", "init_shapes")


def test_the_sections_are_those_of_the_run():
    fields = {f.name: f.type for f in dataclasses.fields(RunConfig)}
    kinds = {name: kind.__name__ for name, kind in NESTED.items()} | {"model": "ModelSettings"}
    assert kinds == {n: t for n, t in fields.items() if n in NESTED}
    assert set(fields) - set(NESTED) == {"name", "stage", "output_dir", "imports", "seed", *INIT}


@pytest.mark.parametrize(
    "text, message",
    [
        ("modle: {width: 3}", r"setting modle: 'modle' is not known\. Did you mean 'model'"),
        ("model: {widht: 3}", r"setting model\.widht: .* Did you mean 'width'"),
        ("model: {width: wide}", r"model\.width: got 'wide'"),
        ("model: 3", r"model: got 3; expected settings"),
        ("model: {size: bse}", r"model\.size: 'bse' is not known\. Did you mean 'base'"),
        (
            "model: {width: 100, num_heads: 12}",
            r"model\.num_heads: got 12; allowed: a divisor of model\.width=100",
        ),
        ("model: {num_references: 3}", r"model\.num_references: got 3; allowed: a divisor"),
        ("model: {num_references: 8}", r"model\.num_references: got 8; .*square grid"),
        ("model: {attention_dropout: 1.0}", r"model\.attention_dropout: got 1\.0"),
        ("data: {crop: middle}", r"data\.crop: got 'middle'"),
        ("flow: {shift: 0}", r"flow\.shift: got 0\.0; allowed: above 0"),
        ("flow: {num_noise_draws: 0}", r"flow\.num_noise_draws: got 0"),
        ("sampling: {guidance_scale: 0.5}", r"sampling\.guidance_scale: got \[0\.5\]; allowed: at least 1"),
        ("sampling: {guidance_interval: [0.5]}", r"sampling\.guidance_interval: got \[0\.5\]"),
        (
            "sampling: {reference_guidance: [1, 2]}",
            r"sampling\.reference_guidance: got \[1\.0, 2\.0\]; allowed: one for each",
        ),
        (
            "optimizer: {warmup_steps: 2000}",
            r"optimizer\.warmup_steps: got 2000; allowed: at most training\.max_steps=1000",
        ),
        ("optimizer: {ema_decay: 1.0}", r"optimizer\.ema_decay: got 1\.0"),
        (
            "optimizer: {more_ema_decays: [1.5]}",
            r"optimizer\.more_ema_decays: got \[1\.5\]; allowed: 0 <= decay < 1",
        ),
        ("training: {micro_batch_size: 100}", r"training\.micro_batch_size: got 100; allowed: a divisor"),
        ("training: {precision: fp16}", r"training\.precision: got 'fp16'"),
        ("name: a/b", r"name: got 'a/b'"),
        ("name: ..", r"name: got '\.\.'; allowed: the name of one folder, without '/', '\\' and '\$'"),
        ("name: ~alice", r"name: got '~alice'; allowed: the name of one folder"),
        ("name: $HOME", r"name: got '\$HOME'"),
        ("name: ' '", r"name: got ' '"),
        ('name: "a\\nb"', r"name: got 'a\\nb'"),
        ("name: ''", r"name: got ''"),
        ("seed: -1", r"seed: got -1; allowed: 0 to 2\^32 - 1"),
        ("sampling: {drift_scale: -0.1}", r"sampling\.drift_scale: got -0\.1; allowed: 0 or more"),
        ("sampling: {guidance_scale: .inf}", r"sampling\.guidance_scale: got inf; allowed: finite numbers"),
        (
            "sampling: {reference_guidance: [.inf]}",
            r"sampling\.reference_guidance: got \[inf\]; allowed: finite numbers",
        ),
        ("optimizer: {weight_decay: -0.1}", r"optimizer\.weight_decay: got -0\.1; allowed: 0 or more"),
        ("optimizer: {eps: 0}", r"optimizer\.eps: got 0\.0; allowed: above 0"),
        ("optimizer: {lr: .nan}", r"optimizer\.lr: got nan; allowed: above 0"),
        ("optimizer: {min_lr: 0.01}", r"optimizer\.min_lr: got 0\.01; allowed: 0 to optimizer\.lr=0\.0008"),
        ("optimizer: {min_lr: -1}", r"optimizer\.min_lr: got -1\.0"),
        ("model: {mlp_ratio: 0}", r"model\.mlp_ratio: got 0\.0; allowed: at least 1 / model\.width=768"),
        (
            "autoencoder_training: {norm_groups: 0}",
            r"autoencoder_training\.norm_groups: got 0; allowed: an integer of at least 1",
        ),
        ("autoencoder_training: {layers_per_block: 0}", r"autoencoder_training\.layers_per_block: got 0"),
        (
            "autoencoder_training: {block_channels: [32, 0]}",
            r"autoencoder_training\.block_channels: got \[32, 0\]",
        ),
        ("evaluation: {seed: -1}", r"evaluation\.seed: got -1"),
        ("evaluation: {metrics: []}", r"evaluation\.metrics: got \[\]; allowed: at least one"),
        ("- 1", "expected settings"),
        ("model: [", "is not YAML: while parsing"),
        ("runs: []", "is a pipeline, a list of runs; start it with: lit-transdiff run"),
    ],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message) as error:
        load_run(write(tmp_path, "run.yaml", text))
    assert "run.yaml" in str(error.value)


# A changed value of each setting of EFFECTS, and a setting beside which it is read.
READ_BESIDE: dict[str, tuple[str, str]] = {
    "data.cache_dir": ("/local", "data.train=s3://bucket/shards"),
    "data.cache_gb": ("20", "data.evaluation=https://host/shards"),
    "checkpoint.best_is": ("highest", "checkpoint.keep_best=eval/precision"),
    "safety.max_bad_steps": ("3", "safety.on_bad_step=skip"),
    "training.validate_every": ("500", "data.evaluation=held_out"),
}


@pytest.mark.parametrize("field", [effect.field for effect in EFFECTS])
def test_a_setting_that_nothing_reads_is_refused_before_training(tmp_path: Path, field: str):
    value, reader = READ_BESIDE[field]
    path = write(
        tmp_path,
        "run.yaml",
        "training: {validate_every: 500}\ndata: {evaluation: held_out}\nflow: {density: uniform}",
    )
    if field == "training.validate_every":
        path = write(tmp_path, "run.yaml", "name: plain")
    check_effects(load_run(path))
    unread = load_run(path, [f"{field}={value}"])
    with pytest.raises(ValueError, match=rf"{field}: got .*; allowed: .*, as "):
        check_effects(unread)
    check_effects(load_run(path, [f"{field}={value}", reader]))


def test_a_trained_run_is_read_whatever_its_settings_read(tmp_path: Path):
    """Such a run may be from before the rule; it is sampled and scored as ever."""
    run = run_from({"safety": {"max_bad_steps": 3}})
    assert (
        override(
            run, ["evaluation.online_images=10", "sampling.solver=heun"], ("sampling", "evaluation")
        ).sampling.solver
        == "heun"
    )


def test_a_missing_file_names_those_nearby(tmp_path: Path):
    write(tmp_path, "run.yaml", "name: x")
    with pytest.raises(FileNotFoundError, match=r"run\.yaml"):
        load_run(tmp_path / "rnu.yaml")


def test_an_override_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"override: got 'model\.width'; allowed: dotted\.key=value"):
        parse_overrides(["model.width"])


def test_a_trained_run_changes_only_how_it_is_sampled_and_scored():
    run = run_from({"model": {"size": "test"}})
    assert override(run, ["sampling.num_steps=3"], ("sampling",)).sampling.num_steps == 3
    with pytest.raises(ValueError, match=r"override: got 'model'; allowed: sampling\.\*"):
        override(run, ["model.width=3"], ("sampling",))


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_sampler_and_single_settings_go_over_it(name: str):
    given = SamplingConfig(reference_steps=[1, 1, 1, 2], guidance_scale=1.7)
    run = RunConfig(model=ModelConfig(num_references=4), sampling=given)
    found = override(run, [*preset(name), "sampling.num_steps=7"], ("sampling",)).sampling
    assert (
        found == dataclasses.replace(given, **{**PRESETS[name], "num_steps": 7})
        and found.guidance_scale == 1.7
    )
    check_sampling(found, run.model)
    assert preset(None) == []


def test_geometry_of_the_paper():
    mrar, large = ModelConfig(num_references=4), ModelConfig(num_references=4, latent_size=32)
    assert (mrar.tokens_per_reference, mrar.reference_patch_size, mrar.num_tokens) == (64, 2, 256)
    assert (large.reference_patch_size, large.num_tokens) == (4, 1024)


def test_a_command_in_a_recipe_needs_a_permission_that_no_file_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    train = f"pipe:touch {tmp_path}/ran"
    write(
        tmp_path,
        "run.yaml",
        f"data: {{train: '{train}', index: index.json}}\n"
        "evaluation: {extractor_weights: x, reference: y}\n",
    )
    write(tmp_path, "pipeline.yaml", f"runs: [{{recipe: run.yaml}}]\noutput_dir: {tmp_path}/runs\n")
    for command in (["train", str(tmp_path / "run.yaml")], ["run", str(tmp_path / "pipeline.yaml")]):
        assert main(command) == 2
        said = capsys.readouterr().err
        assert f"data.train: got '{train}'" in said and "only the option --allow-pipe permits" in said
        assert main([*command, "--allow-pipe", "--dry-run"]) == 2
        assert "--allow-pipe" not in capsys.readouterr().err, "the index is missing, which is looked for next"
    write(tmp_path, "run.yaml", "allow_pipe: true")
    with pytest.raises(ValueError, match="setting allow_pipe"):
        load_run(tmp_path / "run.yaml")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "runs").exists()
