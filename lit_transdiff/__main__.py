"""The command line: the options of all commands, and the exit of the process after errors."""

from __future__ import annotations

import argparse
import atexit
import io
import signal
import sys
from collections.abc import Callable, Sequence

from lit_transdiff import __version__
from lit_transdiff.base.endings import STOP_SIGNALS, Preempted, ending_when_asked, leave, leave_undone
from lit_transdiff.cli import commands, studies
from lit_transdiff.cli.errors import ENDINGS, quiet_libraries, status_of
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
AddArgument = Callable[..., argparse.Action]  # adds an argument to a command
EXIF = "turn images upright by EXIF orientation, or not (as ADM); for files kept unchanged, set data.exif too"


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands and their options."""
    text = "Train, sweep and compare image generators."
    parser = argparse.ArgumentParser(prog="lit-transdiff", description=text)
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(function: Callable[[argparse.Namespace], None], text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(function.__name__.removesuffix("_command"), help=text, description=text)
        sub.set_defaults(function=function)
        own = "a module of your own"
        sub.add_argument("--import", dest="imports", action="append", default=[], metavar="MODULE", help=own)
        return sub

    add_data_commands(command)
    add_model_commands(command)
    add_result_commands(command)
    studies.add_study_commands(command)
    add_machine_commands(command)
    return parser


def with_overrides(add: AddArgument) -> None:
    text = "settings by dotted name, as in model.width=192"
    add("overrides", nargs="*", metavar="key=value", help=text)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line; ``key=value`` settings may come before, between and after the options."""
    parser = build_parser()
    args, rest = parser.parse_known_args(arguments)
    if any(item.startswith("-") or "=" not in item for item in rest) or (rest and "overrides" not in args):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        args.overrides += rest
    return args


def add_data_commands(command: AddCommand) -> None:
    """The commands that prepare a data set."""
    text = "image folder, IDX files or list file -> webdataset shards with an index"
    sub = command(commands.pack_command, text)
    add = sub.add_argument
    add("source")
    add("dest")
    add("--split", choices=("train", "t10k"), help="which of the IDX files")
    sizes = sub.add_mutually_exclusive_group()
    sizes.add_argument("--samples-per-shard", type=int, help="default: 1000")
    sizes.add_argument("--shards", type=int, help="how many shards")
    sizes.add_argument("--shard-size", type=int, metavar="BYTES", help="about how many bytes a shard has")
    add("--seed", type=int, default=0, help="seed of the shuffle")
    add("--image-size", type=int, help="centre-crop and resize to this many pixels")
    add("--pad-to", type=int, help="pad with zeros to this many pixels")
    add("--exif", choices=("turn", "ignore"), default="turn", help=EXIF)
    add("--background", default="white", help="colour behind transparent pixels: " + BACKGROUNDS)
    add("--limit", type=int, help="pack only so many, evenly over the classes")
    add("--class-names", help="names, with commas, or a file of names or folders and names")
    add_workers(add, "write")

    text = "write the index of webdataset shards that you already have"
    add = command(commands.index_command, text).add_argument
    add("folder")
    add("--class-names", help="names in class order, with commas, or a file of one per line")
    text = "member with the class number or name: cls, txt, or json:FIELD; default: cls"
    add("--label", default="cls", help=text)
    add_workers(add, "read")

    add = command(commands.verify_command, "check the SHA-256 of every shard against the index").add_argument
    add("folder")
    add_workers(add, "read")

    text = "image shards -> latent shards, with the autoencoder and image settings of a run"
    add = command(commands.cache_command, text).add_argument
    add("run", help="the run's YAML")
    add("source")
    add("dest")
    add("--flips", action="store_true", help="also cache the latents of the mirrored images")
    add("--batch-size", type=int, default=64, help="images that are encoded together on each device")
    with_overrides(add)

    text = "image shards -> reference statistics, with the extractor of a run"
    add = command(commands.statistics_command, text).add_argument
    add("run", help="the run's YAML")
    add("source", help="folder of image shards, or an .npz file with images as arr_0 (ADM's layout)")
    add("dest", help="a file name ending in .npz")
    with_overrides(add)


def add_workers(add: AddArgument, what: str) -> None:
    text = f"processes that {what} shards; default: this one alone"
    add("--workers", type=int, default=0, help=text)


def add_starting(add: AddArgument) -> None:
    dry, pipe = "print configuration, parameters and steps; write nothing", "permit data.train=pipe:COMMAND"
    add("--dry-run", action="store_true", help=dry)
    add("--allow-pipe", action="store_true", help=f"{pipe}, which runs that command")


def add_trained(add: AddArgument) -> None:
    """The options that choose a trained model, its sampler and its speed."""
    add("--checkpoint", required=True, help="run folder, export folder, or hf://OWNER/NAME")
    add("--preset", choices=PRESETS, help="named sampler settings; key=value overrides them")
    choice = argparse.BooleanOptionalAction
    add("--compile", action=choice, help="torch.compile; by default for many images on a GPU")
    add("--cuda-graphs", action=choice, help="CUDA graphs of the solver; by default on a GPU")


def add_model_commands(command: AddCommand) -> None:
    """The commands that train or convert models."""
    add = command(commands.train_command, "train one run; the same command again continues it").add_argument
    add("run", help="the run's YAML")
    add_starting(add)
    add("--evaluate", action="store_true", help="score the trained model; the scores go to the same run")
    with_overrides(add)

    text = "train, sample and score a list of runs and compare them; the same command again continues it"
    add = command(commands.run_command, text).add_argument
    add("pipeline", help="the pipeline's YAML")
    add_starting(add)
    with_overrides(add)

    text = "write a package for your own ideas: a module, its test, a recipe, a sweep, a notebook"
    add = command(commands.init_command, text).add_argument
    add("folder", help="the package's folder and name, as in my_lab")

    text = "every setting of a run: its values, default and meaning"
    add = command(commands.settings_command, text).add_argument
    add("name", nargs="?", help="a section or a setting, as in sampling or optimizer.lr; default: all")
    add("--markdown", action="store_true", help="print the page docs/settings.md instead")
    text = "print docs/recipe.schema.json, by which editors check a recipe"
    add("--json-schema", action="store_true", help=text)

    text = "released checkpoints (of models, latent diffusion's autoencoder) <-> ours"
    add = command(commands.convert_command, text).add_argument
    add("source", help="a checkpoint, its folder, or kl16.ckpt; back: an export or autoencoder folder")
    add("dest", help="a folder; back: a file name ending in .pth, .pt or .ckpt")
    add("--autoencoder", help="folder of the converted autoencoder that the model was trained with")
    add("--recipe", help="YAML with all other settings, such as sampling and evaluation")
    add("--num-heads", type=int, help="attention heads of a model that has no known size")
    add("--scaling-factor", type=float, help="autoencoders: latents / samples; default: 0.2325")
    with_overrides(add)


def add_result_commands(command: AddCommand) -> None:
    """The commands that sample, score and compare trained models."""
    text = "draw images from a trained run: a labelled grid and single images"
    sub = command(commands.sample_command, text)
    add = sub.add_argument
    add_trained(add)
    add("--classes", help="names or numbers, as in sneaker,bag or 0,7 or 0-3; default: the first ten")
    add("--per-class", type=int, help="images of a class; default: 8, or 1 with --film")
    add("--seed", type=int, default=0)
    kinds = sub.add_mutually_exclusive_group()
    kinds.add_argument("--film", action="store_true", help="show the images part by part, or step by step")
    kinds.add_argument("--references", action="store_true", help="show the row of successive images of MRAR")
    kinds.add_argument("--fuse", choices=("halves", "random"), help="splice the features of two classes")
    add("--profile", action="store_true", help="also write a profile of the sampling to the output folder")
    add("--output", help="folder; default: samples/drawn in the run folder, or drawn-2, ...")
    with_overrides(add)

    text = "score a trained run; store the scores and all settings"
    add = command(commands.evaluate_command, text).add_argument
    add_trained(add)
    add("--output", help="folder that all processes share; default: the run folder")
    add("--save-images", choices=("npz", "folder", "both"), help="also keep the images: ADM .npz, PNG files")
    with_overrides(add)

    text = "image shards -> the scores of real images and of their reconstructions"
    add = command(commands.bounds_command, text).add_argument
    add("run", help="the run's YAML: its extractor, reference, metrics and number of images")
    add("source", help="folder of image shards, not the ones of the reference")
    with_overrides(add)

    text = "a row of the paper's table from the released files: convert, generate, score, ours beside theirs"
    add = command(commands.reproduce_command, text).add_argument
    add("row", help="a name in experiments/baselines.json, as in L-MRAR")
    add("--weights", required=True, help="checkpoint-last.pth, or its folder")
    add("--vae", required=True, help="kl16.ckpt")
    add("--inception", required=True, help="InceptionV3's weights file, in torch-fidelity's layout")
    add("--reference", required=True, help="statistics of the real images (.npz), as in adm_in256_stats.npz")
    add("--output", default="runs/reproduce", help="folder; default: %(default)s")
    add("--experiments", default="experiments", help="folder of the recipes; default: %(default)s")
    with_overrides(add)

    text = "one table of all scored runs below a folder, as text, Markdown, CSV and a picture"
    add = command(commands.compare_command, text).add_argument
    add("folder")
    add("--output", help="folder; default: the same")


def add_machine_commands(command: AddCommand) -> None:
    """The commands about machines and checkpoints, before and after a run."""
    text = "memory, time and network of a run for every strategy, before it is started"
    add = command(commands.plan_command, text).add_argument
    add("run", help="the run's YAML")
    add("--gpus", type=int, required=True)
    add("--gpu", required=True, help="as in h200, h100, a100-80gb")
    add("--mfu", type=float, default=0.35, help="fraction of peak FLOP/s; default: %(default)s")
    with_overrides(add)

    text = "check this machine, or torchrun's allocation: devices, network, disk, versions"
    add = command(commands.doctor_command, text).add_argument
    add("--folder", default="runs", help="a folder that all nodes must see; default: %(default)s")
    add("--shards", help="a folder of shards whose read speed is measured")

    text = "a checkpoint of any strategy -> plain averaged weights (safetensors) and config.yaml"
    add = command(commands.export_command, text).add_argument
    add("run_folder")
    add("--step", type=int, help="default: the last checkpoint")
    text = "ema, ema_DECAY of optimizer.more_ema_decays, or last for the weights"
    add("--average", default="ema", help=text)
    add("--half", action="store_true", help="in float16, which takes half the space")
    add("--output", help="folder; default: export-STEP in the run folder")
    add("--hub", metavar="OWNER/NAME", help="also upload the trained model to this repository")
    add("--private", action="store_true", help="make the repository private")
    add("--revision", metavar="BRANCH", help="of the repository; default: main")
    add("--license", default="mit", help="that of the weights, as the Hub names it; default: mit")


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
        handler, numbers = (leave, STOP_SIGNALS) if goes_on else (leave_undone, (signal.SIGINT,))
        with ending_when_asked(handler, numbers):
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
