"""The command line: the options of all commands, and the exit of the process after errors."""

from __future__ import annotations

import argparse
import atexit
import io
import logging
import signal
import sys
import warnings
from collections.abc import Callable, Sequence

from lit_transdiff import __version__
from lit_transdiff.base.endings import STOP_SIGNALS, Preempted, ending_when_asked, leave, leave_undone
from lit_transdiff.cli import commands, studies
from lit_transdiff.cli.errors import ENDINGS, status_of
from lit_transdiff.cli.studies import AddCommand
from lit_transdiff.config import BACKGROUNDS, PRESETS
from lit_transdiff.config.imports import import_modules
from lit_transdiff.config.paths import expand_paths
from lit_transdiff.tracking.preempted import mark_preempting

# These continue where they were stopped. The others begin again: Ctrl-C leaves no partial output of them.
RESUMABLE = (
    commands.train_command,
    commands.run_command,
    commands.evaluate_command,
    commands.reproduce_command,
    commands.cache_command,
    commands.pack_command,
    studies.sweep_command,
    studies.study_command,
)
EXIF = "turn images upright by EXIF orientation, or not (as ADM); for files kept unchanged, set data.exif too"
QUIET = (  # loggers whose information does not help users; cuda logs LOCAL_RANK at every start of a Trainer
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.pytorch.accelerators.cuda",
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their options."""
    parser = argparse.ArgumentParser(
        prog="lit-transdiff", description="Train, sweep and compare image generators."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(function.__name__.removesuffix("_command"), help=text, description=text)
        sub.set_defaults(function=function)
        sub.add_argument(
            "--import",
            dest="imports",
            action="append",
            default=[],
            metavar="MODULE",
            help="a module of your own",
        )
        return sub

    def with_overrides(sub: argparse.ArgumentParser) -> None:
        sub.add_argument(
            "overrides", nargs="*", metavar="key=value", help="settings by dotted name, as in model.width=192"
        )

    add_data_commands(command, with_overrides)
    add_model_commands(command, with_overrides)
    add_result_commands(command, with_overrides)
    studies.add_study_commands(command)
    add_machine_commands(command, with_overrides)
    return parser


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``key=value`` settings may come before, between and after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def add_data_commands(command: AddCommand, with_overrides: Callable[[argparse.ArgumentParser], None]) -> None:
    """The commands that prepare a data set."""
    sub = command(
        commands.pack_command, "image folder, IDX files or list file -> webdataset shards with an index"
    )
    sub.add_argument("source")
    sub.add_argument("dest")
    sub.add_argument("--split", choices=("train", "t10k"), help="which of the IDX files")
    sizes = sub.add_mutually_exclusive_group()
    sizes.add_argument("--samples-per-shard", type=int, help="default: 1000")
    sizes.add_argument("--shards", type=int, help="how many shards")
    sizes.add_argument("--shard-size", type=int, metavar="BYTES", help="about how many bytes a shard has")
    sub.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    sub.add_argument("--image-size", type=int, help="centre-crop and resize to this many pixels")
    sub.add_argument("--pad-to", type=int, help="pad with zeros to this many pixels")
    sub.add_argument("--exif", choices=("turn", "ignore"), default="turn", help=EXIF)
    sub.add_argument("--background", default="white", help="colour behind transparent pixels: " + BACKGROUNDS)
    sub.add_argument("--limit", type=int, help="pack only so many, evenly over the classes")
    sub.add_argument("--class-names", help="names, with commas, or a file of names or folders and names")
    add_workers(sub, "write")

    sub = command(commands.index_command, "write the index of webdataset shards that you already have")
    sub.add_argument("folder")
    sub.add_argument("--class-names", help="names in class order, with commas, or a file of one per line")
    sub.add_argument(
        "--label",
        default="cls",
        help="member with the class number or name: cls, txt, or json:FIELD; default: cls",
    )
    add_workers(sub, "read")

    sub = command(commands.verify_command, "check the SHA-256 of every shard against the index")
    sub.add_argument("folder")
    add_workers(sub, "read")

    sub = command(
        commands.cache_command,
        "image shards -> latent shards, with the autoencoder and image settings of a run",
    )
    sub.add_argument("run", help="the run's YAML")
    sub.add_argument("source")
    sub.add_argument("dest")
    sub.add_argument("--flips", action="store_true", help="also cache the latents of the mirrored images")
    sub.add_argument(
        "--batch-size", type=int, default=64, help="images that are encoded together on each device"
    )
    with_overrides(sub)

    sub = command(
        commands.statistics_command, "image shards -> reference statistics, with the extractor of a run"
    )
    sub.add_argument("run", help="the run's YAML")
    sub.add_argument(
        "source", help="folder of image shards, or an .npz file with images as arr_0 (ADM's layout)"
    )
    sub.add_argument("dest", help="a file name ending in .npz")
    with_overrides(sub)


def add_workers(sub: argparse.ArgumentParser, what: str) -> None:
    text = f"processes that {what} shards; default: this one alone"
    sub.add_argument("--workers", type=int, default=0, help=text)


def add_starting(sub: argparse.ArgumentParser) -> None:
    dry, pipe = "print configuration, parameters and steps; write nothing", "permit data.train=pipe:COMMAND"
    sub.add_argument("--dry-run", action="store_true", help=dry)
    sub.add_argument("--allow-pipe", action="store_true", help=f"{pipe}, which runs that command")


def add_trained(sub: argparse.ArgumentParser) -> None:
    """The options that choose a trained model, its sampler and its speed."""
    sub.add_argument("--checkpoint", required=True, help="run folder, export folder, or hf://OWNER/NAME")
    sub.add_argument("--preset", choices=PRESETS, help="named sampler settings; key=value overrides them")
    choice = argparse.BooleanOptionalAction
    sub.add_argument("--compile", action=choice, help="torch.compile; by default for many images on a GPU")
    sub.add_argument("--cuda-graphs", action=choice, help="CUDA graphs of the solver; by default on a GPU")


def add_model_commands(
    command: AddCommand, with_overrides: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The commands that train or convert models."""
    sub = command(commands.train_command, "train one run; the same command again continues it")
    sub.add_argument("run", help="the run's YAML")
    add_starting(sub)
    sub.add_argument(
        "--evaluate", action="store_true", help="score the trained model; the scores go to the same run"
    )
    with_overrides(sub)

    text = "train, sample and score a list of runs and compare them; the same command again continues it"
    sub = command(commands.run_command, text)
    sub.add_argument("pipeline", help="the pipeline's YAML")
    add_starting(sub)
    with_overrides(sub)

    sub = command(
        commands.init_command,
        "write a package for your own ideas: a module, its test, a recipe, a sweep, a notebook",
    )
    sub.add_argument("folder", help="the package's folder and name, as in my_lab")

    sub = command(commands.settings_command, "every setting of a run: its values, default and meaning")
    sub.add_argument(
        "name", nargs="?", help="a section or a setting, as in sampling or optimizer.lr; default: all"
    )
    sub.add_argument("--markdown", action="store_true", help="print the page docs/settings.md instead")
    sub.add_argument(
        "--json-schema",
        action="store_true",
        help="print docs/recipe.schema.json, by which editors check a recipe",
    )

    sub = command(
        commands.convert_command, "released checkpoints (TransDiff, latent diffusion's autoencoder) <-> ours"
    )
    sub.add_argument(
        "source", help="checkpoint-last.pth, its folder, or kl16.ckpt; back: an export or autoencoder folder"
    )
    sub.add_argument("dest", help="a folder; back: a file name ending in .pth or .ckpt")
    sub.add_argument(
        "--autoencoder", help="folder of the converted autoencoder that the model was trained with"
    )
    sub.add_argument("--recipe", help="YAML with all other settings, such as sampling and evaluation")
    sub.add_argument("--num-heads", type=int, help="attention heads of a model that has no known size")
    sub.add_argument("--scaling-factor", type=float, help="autoencoders: latents / samples; default: 0.2325")
    with_overrides(sub)


def add_result_commands(
    command: AddCommand, with_overrides: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The commands that sample, score and compare trained models."""
    sub = command(
        commands.sample_command, "draw images from a trained run: a labelled grid and single images"
    )
    add_trained(sub)
    sub.add_argument(
        "--classes", help="names or numbers, as in sneaker,bag or 0,7 or 0-3; default: the first ten"
    )
    sub.add_argument("--per-class", type=int, help="images of a class; default: 8, or 1 with --film")
    sub.add_argument("--seed", type=int, default=0)
    kinds = sub.add_mutually_exclusive_group()
    kinds.add_argument("--film", action="store_true", help="show the images part by part, or step by step")
    kinds.add_argument("--references", action="store_true", help="show the row of successive images of MRAR")
    kinds.add_argument("--fuse", choices=("halves", "random"), help="splice the features of two classes")
    sub.add_argument(
        "--profile", action="store_true", help="also write a profile of the sampling to the output folder"
    )
    sub.add_argument("--output", help="folder; default: samples/drawn in the run folder, or drawn-2, ...")
    with_overrides(sub)

    sub = command(commands.evaluate_command, "score a trained run; store the scores and all settings")
    add_trained(sub)
    sub.add_argument("--output", help="folder that all processes share; default: the run folder")
    sub.add_argument(
        "--save-images", choices=("npz", "folder", "both"), help="also keep the images: ADM .npz, PNG files"
    )
    with_overrides(sub)

    sub = command(
        commands.bounds_command, "image shards -> the scores of real images and of their reconstructions"
    )
    sub.add_argument("run", help="the run's YAML: its extractor, reference, metrics and number of images")
    sub.add_argument("source", help="folder of image shards, not the ones of the reference")
    with_overrides(sub)

    text = (
        "a row of the paper's table from the released files: convert, generate, score, ours beside the "
        "paper's"
    )
    sub = command(commands.reproduce_command, text)
    sub.add_argument("row", help="a name in experiments/baselines.json, as in L-MRAR")
    sub.add_argument("--weights", required=True, help="checkpoint-last.pth, or its folder")
    sub.add_argument("--vae", required=True, help="kl16.ckpt")
    sub.add_argument(
        "--inception", required=True, help="InceptionV3's weights file, in torch-fidelity's layout"
    )
    sub.add_argument(
        "--reference", required=True, help="statistics of the real images (.npz), as in adm_in256_stats.npz"
    )
    sub.add_argument("--output", default="runs/reproduce", help="folder; default: %(default)s")
    sub.add_argument(
        "--experiments", default="experiments", help="folder of the recipes; default: %(default)s"
    )
    with_overrides(sub)

    sub = command(
        commands.compare_command,
        "one table of all scored runs below a folder, as text, Markdown, CSV and a picture",
    )
    sub.add_argument("folder")
    sub.add_argument("--output", help="folder; default: the same")


def add_machine_commands(
    command: AddCommand, with_overrides: Callable[[argparse.ArgumentParser], None]
) -> None:
    """The commands about machines and checkpoints, before and after a run."""
    sub = command(
        commands.plan_command, "memory, time and network of a run for every strategy, before it is started"
    )
    sub.add_argument("run", help="the run's YAML")
    sub.add_argument("--gpus", type=int, required=True)
    sub.add_argument("--gpu", required=True, help="as in h200, h100, a100-80gb")
    sub.add_argument("--mfu", type=float, default=0.35, help="fraction of peak FLOP/s; default: %(default)s")
    with_overrides(sub)

    sub = command(
        commands.doctor_command,
        "check this machine, or torchrun's allocation: devices, network, disk, versions",
    )
    sub.add_argument(
        "--folder", default="runs", help="a folder that all nodes must see; default: %(default)s"
    )
    sub.add_argument("--shards", help="a folder of shards whose read speed is measured")

    sub = command(
        commands.export_command,
        "a checkpoint of any strategy -> plain averaged weights (safetensors) and config.yaml",
    )
    sub.add_argument("run_folder")
    sub.add_argument("--step", type=int, help="default: the last checkpoint")
    sub.add_argument(
        "--average",
        default="ema",
        help="ema, ema_DECAY of optimizer.more_ema_decays, or last for the weights",
    )
    sub.add_argument("--half", action="store_true", help="in float16, which takes half the space")
    sub.add_argument("--output", help="folder; default: export-STEP in the run folder")
    sub.add_argument("--hub", metavar="OWNER/NAME", help="also upload the trained model to this repository")
    sub.add_argument("--private", action="store_true", help="make the repository private")
    sub.add_argument("--revision", metavar="BRANCH", help="of the repository; default: main")
    sub.add_argument(
        "--license", default="mit", help="that of the weights, as the Hub names it; default: mit"
    )


def quiet_libraries() -> None:
    """Show our own messages, and of the libraries only warnings about problems that a user can solve."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s")
    logging.getLogger("lit_transdiff").setLevel(logging.INFO)
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("DeepSpeed").addFilter(
        lambda record: "ZeRO with an untested optimizer" not in record.getMessage()
    )
    warnings.filterwarnings("ignore", module="lightning")
    # DeepSpeed's calls
    warnings.filterwarnings("ignore", message=r"`torch\.distributed\.\w+` is (deprecated|a private function)")


def end_process_group() -> None:
    """Leave the process group at the end; NCCL warns about a process that does not."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; a bad setting or a missing file ends in one line and an exit code of ``endings``."""
    args = parse(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # so that the log of a batch job shows its progress
    quiet_libraries()
    goes_on = args.function in RESUMABLE
    try:
        expand_paths(args)
        with ending_when_asked(
            leave if goes_on else leave_undone, STOP_SIGNALS if goes_on else (signal.SIGINT,)
        ):
            import_modules(args.imports)
            args.function(args)
    except ENDINGS as error:
        if isinstance(error, Preempted):
            mark_preempting(error)
        return status_of(error)
    atexit.register(end_process_group)
    return 0


if __name__ == "__main__":
    sys.exit(main())
