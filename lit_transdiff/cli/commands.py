"""The commands: one thin function each, no logic. Their options are in ``__main__``.

Heavy imports are inside the functions, after the checks that do not need them, so that ``--help``, a bad
option and a wrong path are answered at once.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from lit_transdiff.base.hub import local
from lit_transdiff.cli.exports import exported
from lit_transdiff.config import RunConfig, is_stream, require
from lit_transdiff.config.classes import choose_classes
from lit_transdiff.config.loading import load_run, override, read_yaml
from lit_transdiff.config.paths import (
    check_files,
    check_pack_source,
    check_pipe,
    check_source,
    export_folder,
    local_path,
    parse_names,
    results_folder,
    trained_place,
)
from lit_transdiff.data.index_files import check_index
from lit_transdiff.evaluation.scores import result_files, score_in_words

CHANGEABLE = ("sampling", "evaluation")  # sections of a trained run that a command may override


def pack_command(args: argparse.Namespace) -> None:
    check_pack_source(Path(args.source))
    from lit_transdiff.data.encode import Encoding
    from lit_transdiff.data.pack import Cut, pack

    print(
        pack(
            args.source,
            args.dest,
            split=args.split,
            class_names=parse_names(args.class_names),
            limit=args.limit,
            seed=args.seed,
            encoding=Encoding(args.image_size, args.pad_to, args.exif, args.background),
            cut=Cut(args.samples_per_shard, args.shards, args.shard_size),
            workers=args.workers,
        )
    )


def index_command(args: argparse.Namespace) -> None:
    from lit_transdiff.data.verify import index_again

    found = index_again(args.folder, parse_names(args.class_names), args.workers, args.label)
    count = f"{len(found)} samples of {found.num_classes} classes in {len(found.shards)} shards"
    print(f"{count}: {args.folder}/index.json")
    from lit_transdiff.data.findings import notes_on_classes

    for note in notes_on_classes(found):
        print(f"note: {note}")


def verify_command(args: argparse.Namespace) -> None:
    from lit_transdiff.data.verify import verify

    found = verify(args.folder, args.workers)
    print(f"{len(found)} samples in {len(found.shards)} shards: every checksum is right")


def cache_command(args: argparse.Namespace) -> None:
    run = load_run(args.run, args.overrides, args.imports)
    check_index(args.source)
    from lit_transdiff.distributed import build_fabric
    from lit_transdiff.evaluation.prepare import cache

    fabric = build_fabric()
    found = cache(
        args.source,
        args.dest,
        autoencoder=run.autoencoder,
        data=run.data,
        fabric=fabric,
        flips=args.flips,
        batch_size=args.batch_size,
    )
    shape = found.latents.shape if found.latents else ""
    fabric.print(f"{len(found)} latents of shape {shape} in {args.dest}")


def statistics_command(args: argparse.Namespace) -> None:
    run = load_run(args.run, args.overrides, args.imports)
    if not args.source.endswith(".npz"):
        check_index(args.source)
    from lit_transdiff.distributed import default_device
    from lit_transdiff.evaluation.features import load_extractor
    from lit_transdiff.evaluation.prepare import statistics

    extractor = load_extractor(run.evaluation.extractor, run.evaluation.extractor_weights, default_device())
    found = statistics(args.source, args.dest, data=run.data, extractor=extractor)
    print(f"{found.num_images} images, {found.mu.size} features, hash {found.hash}: {args.dest}")


def bounds_command(args: argparse.Namespace) -> None:
    run = load_run(args.run, args.overrides, args.imports)
    check_index(args.source)
    from lit_transdiff.distributed import default_device
    from lit_transdiff.evaluation.bounds import best_scores

    for kind, scores in best_scores(run, args.source, default_device()).items():
        print(*(f"{kind:16} {name:20} {score_in_words(score)}" for name, score in scores.items()), sep="\n")


def train_command(args: argparse.Namespace) -> None:
    from lit_transdiff.tracking.place import placed

    run = placed(load_run(args.run, args.overrides, args.imports))
    check_pipe(run.data.train, args.allow_pipe)
    check_inputs(run)
    if args.dry_run:
        from lit_transdiff.cli.pipeline import dry_run

        return dry_run([run])
    if args.evaluate:
        from lit_transdiff.cli.pipeline import train_and_score
        from lit_transdiff.distributed import build_fabric

        return train_and_score(run, build_fabric())
    from lit_transdiff.training.trainer import train

    print(f"trained: {train(run).folder}")


def check_inputs(run: RunConfig) -> None:
    """Check that the data and the initial model of a new run exist; training checks them more closely."""
    if run.folder.exists():  # the run may be complete and no longer need them
        return
    for source in (run.data.train, run.data.evaluation):
        if source and not is_stream(source):
            check_index(source)
    if run.init_from is not None:
        export_folder(run.init_from)


def run_command(args: argparse.Namespace) -> None:
    read_yaml(args.pipeline)
    from lit_transdiff.cli.pipeline import dry_run, load_pipeline, run_pipeline
    from lit_transdiff.distributed import build_fabric

    pipeline, runs = load_pipeline(args.pipeline, args.overrides, args.imports)
    for each in runs:
        check_pipe(each.data.train, args.allow_pipe)
    if args.dry_run:
        return dry_run(runs, pipeline)
    run_pipeline(pipeline, runs, build_fabric())


def init_command(args: argparse.Namespace) -> None:
    from lit_transdiff.cli.own_package import write_package

    written = write_package(Path(args.folder))
    print("\n".join(map(str, written)))
    print(f"Next: cd {args.folder} && pip install -e . && pytest && lit-transdiff train recipe.yaml")


def settings_command(args: argparse.Namespace) -> None:
    from lit_transdiff.config.reference import settings_as_markdown, settings_as_text
    from lit_transdiff.config.schema import schema_as_json

    text = settings_as_text(args.name)
    print(schema_as_json() if args.json_schema else settings_as_markdown() if args.markdown else text, end="")


def convert_command(args: argparse.Namespace) -> None:
    if args.overrides and not args.recipe:
        raise ValueError(
            f"override: got {args.overrides}; allowed: only with --recipe, whose settings they change."
        )
    recipe = load_run(args.recipe, args.overrides, args.imports) if args.recipe else None
    source, autoencoder = local(args.source), args.autoencoder and local(args.autoencoder)
    check_source(source)
    from lit_transdiff.released.convert import convert

    report = convert(
        source,
        args.dest,
        autoencoder=autoencoder,
        recipe=recipe,
        num_heads=args.num_heads,
        scaling_factor=args.scaling_factor,
    )
    print(report)


def sample_command(args: argparse.Namespace) -> None:
    args.checkpoint = trained_place(args.checkpoint)
    from lit_transdiff.base.profile import Profile
    from lit_transdiff.cli.trained import trained_generator
    from lit_transdiff.config.targets import fresh_folder
    from lit_transdiff.distributed import default_device
    from lit_transdiff.sampling.draw import draw_fusion, draw_samples
    from lit_transdiff.sampling.film import draw_film

    generator, overrides = trained_generator(args, default_device())
    sampling = override(generator.run, overrides, CHANGEABLE).sampling
    generator = generator.at(sampling.precision)
    classes = choose_classes(args.classes, generator.names)
    allowed = "with --fuse two classes, as in 0,7"
    require(not args.fuse or len(classes) == 2, "--classes", args.classes, allowed)
    output = fresh_folder(Path(args.output or results_folder(args.checkpoint) / "samples" / "drawn"))
    per_class = (1 if args.film else 8) if args.per_class is None else args.per_class
    if args.film:
        draw = partial(draw_film, generator, classes)
    elif args.fuse:
        draw = partial(draw_fusion, generator, (classes[0], classes[1]), kind=args.fuse)
    else:
        draw = partial(draw_samples, generator, classes, references=args.references)
    with Profile(output / "profile") if args.profile else nullcontext():
        print(draw(per_class, output, sampling=sampling, seed=args.seed))
    if args.profile:
        print(f"profile: {output / 'profile'}")


def evaluate_command(args: argparse.Namespace) -> None:
    args.checkpoint = trained_place(args.checkpoint)
    from lit_transdiff.checkpoints.places import pinned_run
    from lit_transdiff.cli.pipeline import score_checkpoint
    from lit_transdiff.cli.trained import trained_generator
    from lit_transdiff.distributed import build_fabric

    fabric = build_fabric()
    args.checkpoint = fabric.broadcast(args.checkpoint)  # the same commit on all ranks
    generator, overrides = trained_generator(args, fabric.device)
    settings, _ = pinned_run(override(generator.run, overrides, (*CHANGEABLE, "tracking")))
    output = Path(args.output) if args.output else None
    result = score_checkpoint(generator, settings, output, fabric, save_images=args.save_images)
    for name, score in result["scores"].items():
        fabric.print(f"{name:20} {score_in_words(score)}")
    fabric.print(result["file"])


def reproduce_command(args: argparse.Namespace) -> None:
    given = {name: local(getattr(args, name)) for name in ("weights", "vae", "inception", "reference")}
    check_files({name: path for name, path in given.items() if not path.is_dir()})
    from lit_transdiff.distributed import build_fabric
    from lit_transdiff.released.reproduce import Files, reproduce

    files = Files(**given)
    fabric = build_fabric()
    output, experiments = Path(args.output), Path(args.experiments)
    fabric.print(
        reproduce(args.row, files, output, fabric=fabric, experiments=experiments, overrides=args.overrides)
    )


def compare_command(args: argparse.Namespace) -> None:
    result_files(args.folder)
    from lit_transdiff.study.table import write_comparison

    print(write_comparison(args.folder, args.output or args.folder))


def report_command(args: argparse.Namespace) -> None:
    _ = [local_path(place) for place in args.folder]
    from lit_transdiff.study.report import read_sets, report_file, write_report

    file = Path(args.output or report_file(*args.folder))
    print(write_report(read_sets(args.folder), file, title=", ".join(args.folder)))


def export_command(args: argparse.Namespace) -> None:
    folder = exported(args)
    print(folder)
    if args.hub is not None:
        from lit_transdiff.publish.push import push

        print(push(folder, args.hub, private=args.private, revision=args.revision, licence=args.license))


def plan_command(args: argparse.Namespace) -> None:
    run = load_run(args.run, args.overrides, args.imports)
    from lit_transdiff.planning.planner import plan

    print(plan(run, args.gpus, args.gpu, args.mfu))


def doctor_command(args: argparse.Namespace) -> None:
    if args.shards:
        check_index(args.shards)
    from lit_transdiff.planning.doctor import examine

    sys.exit(examine(Path(args.folder), args.shards))
