"""Uploading an export to the Hugging Face Hub, in one commit: the model, its card and its scores.

An autoencoder or a classifier lies in the root of its repository, where diffusers and the setting of its
path look for it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lit_transdiff.base.hub import LOGIN, SCHEME, UPLOAD_PATIENCE, HubPlace, asking, hub_place
from lit_transdiff.checkpoints.export import earlier_files, read_export
from lit_transdiff.checkpoints.portable import OF_DIFFUSERS, portable
from lit_transdiff.config import RunConfig, expanded, require, shipped
from lit_transdiff.config.paths import export_folder, results_folder, uploaded_folder
from lit_transdiff.distributed import default_device
from lit_transdiff.evaluation.scores import FOLDER
from lit_transdiff.publish.card import CARD_CLASSES, CARD_PER_CLASS, CARD_PICTURE, card_of
from lit_transdiff.publish.prepared import prepared_card, read_prepared
from lit_transdiff.sampling.draw import draw_samples
from lit_transdiff.sampling.generator import Generator, load_generator
from lit_transdiff.study.folders import evaluations_in
from lit_transdiff.study.records import Evaluation

EXPORT = "run/export/"  # the folder of the export in a repository: that of a run folder
OF_HUB = (".gitattributes", "README.md", "LICENSE")  # files that a new repository may have
Contents = Mapping[str, Path | bytes]


def push(
    run: str | Path,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    licence: str = "mit",
    say: Callable[[str], None] = print,
) -> str:
    """Upload the trained model of a run folder or export folder to the repository OWNER/NAME of the Hub.

    The run is of any stage that comes with this package. The repository is made if there is none, and so is a
    branch ``revision``. Returns the place of the new
    commit, ``hf://OWNER/NAME@COMMIT``, which can be used wherever a trained model is named. Raises
    ``ValueError`` if the repository has files of others, and ``HubError`` if the Hub does not answer.
    """
    at = hub_place(f"{SCHEME}{repo}" + (f"@{revision}" if revision else ""), "--hub")
    require(at.kind == "model" and at.repo == repo, "--hub", repo, "OWNER/NAME")
    run = shipped(expanded(str(run), "run"))
    if (prepared := read_prepared(uploaded_folder(run))) is not None:
        earlier = opened(at, private, "")
        content: dict[str, Path | bytes] = {name: prepared.folder / name for name in prepared.files}
        content["README.md"] = prepared_card(prepared, repo, licence).encode()
        return uploaded(at, content, set(), message_of(prepared.run, prepared.info))
    export = read_export(run)
    earlier = opened(at, private, EXPORT)
    generator = load_generator(run, default_device())  # refuses an autoencoder that does not belong to it
    say(f"{at}: drawing the picture of its card")
    evaluations = evaluations_by(run, export.fingerprint)
    content = {
        "README.md": card_of(export, repo, evaluations, licence).encode(),
        CARD_PICTURE: picture_by(generator),
        **{name: text.encode() for name, text in OF_DIFFUSERS.items()},
        **{f"run/{FOLDER}/{Path(one.where).name}": Path(one.where) for one in evaluations},
    }
    names = earlier_files(export.folder)
    files = portable(export.folder, names, export.info, generator.run.autoencoder)
    content |= {f"{EXPORT}{name}": file for name, file in files.items() if name not in OF_DIFFUSERS}
    gone = {name for name in earlier - set(content) if name.startswith(EXPORT)}
    return uploaded(at, content, gone, message_of(export.run, export.info))


def message_of(run: RunConfig, info: Mapping[str, Any]) -> str:
    """The message of the commit."""
    steps = f"step {info['step']:,}" if "step" in info else "no known step"
    return f"lit_transdiff: {run.name}, {steps}"


def opened(at: HubPlace, private: bool, prefix: str) -> set[str]:
    """Make the repository and branch of a place, unless they exist, and return the files there.

    Raises ``ValueError`` for files without an export at ``prefix``, which ``push`` did not write, and for a
    public one that is to be private.
    """
    from huggingface_hub import HfApi, constants, get_token

    require(get_token() is not None, "--hub", at.repo, f"after logging in only: {LOGIN}")
    require(not constants.is_offline_mode(), "HF_HUB_OFFLINE", "1", "0 for an upload")
    api = HfApi()
    with asking(at):
        api.create_repo(at.repo, private=private or None, exist_ok=True)
        is_private = api.repo_info(at.repo, timeout=constants.HF_HUB_ETAG_TIMEOUT).private
        if at.revision is not None:
            api.create_branch(at.repo, branch=at.revision, exist_ok=True)
        there = set(api.list_repo_files(at.repo, revision=at.revision))
    require(is_private or not private, "--private", at.repo, "a repository that is private, or a new one")
    foreign = sorted(there - {*OF_HUB})
    if foreign and f"{prefix}export.json" not in there:
        way = "Nothing is overwritten: choose another repository."
        raise ValueError(f"{at} holds {', '.join(foreign[:3])}, which push did not write. {way}")
    return there


def evaluations_by(run: str | Path, fingerprint: str) -> list[Evaluation]:
    """The results of exactly these weights, from where ``evaluate`` puts those of a run or an export."""
    folder = export_folder(run)
    places = {place.resolve() for place in (results_folder(run), folder, folder.parent)}
    found = [one for place in sorted(places) for one in evaluations_in(place / FOLDER)]
    return [one for one in found if one.manifest.get("weights_fingerprint") == fingerprint]


def picture_by(generator: Generator) -> bytes:
    """The picture of the card, drawn as its command says."""
    classes = list(range(min(CARD_CLASSES, generator.run.model.num_classes)))
    with tempfile.TemporaryDirectory() as folder:
        return draw_samples(generator, classes, CARD_PER_CLASS, Path(folder)).read_bytes()


def uploaded(at: HubPlace, content: Contents, gone: set[str], message: str) -> str:
    """Commit the files and remove those that are ``gone``; the place of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    operations: list[Any] = [
        CommitOperationAdd(name, file if isinstance(file, bytes) else str(file))
        for name, file in content.items()
    ]
    operations += [CommitOperationDelete(name) for name in sorted(gone)]
    with asking(at, UPLOAD_PATIENCE):
        commit = HfApi().create_commit(at.repo, operations, commit_message=message, revision=at.revision)
    return str(HubPlace(at.repo, commit.oid))
