"""Publishing on the Hub what psoft-export wrote, in one commit, with a model card.

`huggingface_hub` moves the bytes: what is up already is not sent again, and nothing shows in the
repository before all of it is there.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    constants,
    hf_hub_download,
    metadata_load,
)
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.hf_api import ModelInfo

from psoft_export.adapters import basis_record
from psoft_export.adapters.files import CONFIG, SAFETENSORS, adapter_files, named_base
from psoft_export.checkpoint import companions
from psoft_export.checkpoint.hub import checked_token, hub_problem, is_hub_id, is_valid_id
from psoft_export.checkpoint.reader import file_sha256, open_checkpoint
from psoft_export.checkpoint.safetensors_file import read_header
from psoft_export.errors import (
    AdapterError,
    CheckpointError,
    HubError,
    NotEquivalentError,
    PsoftExportError,
    UsageError,
    first_line,
)
from psoft_export.inspection import inspect
from psoft_export.manifest import FILENAME, FORMAT_VERSION
from psoft_export.model_card import adapter_card, is_handwritten, lora_card, merged_card

CARD = "README.md"
Kind = Literal["merged", "lora", "adapter"]

_MESSAGES: dict[Kind, str] = {
    "merged": "Upload the merged checkpoint, with psoft-export",
    "lora": "Upload the LoRA adapter, with psoft-export",
    "adapter": "Upload the PSOFT adapter, with psoft-export",
}
# What a loader takes in preference to, or together with, the files that are pushed.
_LOADED = re.compile(
    r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    rf"|{re.escape(CONFIG)}|{re.escape(basis_record.FILENAME)}|{re.escape(FILENAME)}"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LEFT_HERE = {"__pycache__"}


@dataclass(frozen=True)
class PushReport:
    """What was published.

    Attributes:
        repo_id: the repository, with its owner.
        url: page of the commit, or of the pull request.
        commit: the commit's hash.
        pull_request: page of the pull request, or None.
        files: names of the files that the folder has, in the commit or there before.
        removed: files taken out of the repository, which a loader would have taken for these.
        card: `written`: made from the facts; `kept`: somebody's own, in the folder or on the Hub.
        warnings: what the user should know, one plain sentence each.
    """

    repo_id: str
    url: str
    commit: str
    pull_request: str | None
    files: tuple[str, ...]
    removed: tuple[str, ...]
    card: Literal["written", "kept"]
    warnings: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The report as one JSON-ready object."""
        return asdict(self)


@dataclass(frozen=True)
class Publication:
    """A folder that can be published.

    Attributes:
        folder: the folder.
        kind: `merged`, `lora`, or `adapter`: a PSOFT adapter in PEFT's format.
        files: name in the repository → file; the card is not among them.
        base_model: Hub id of the base as far as the files say, or None.
        verified_base: whether the base was read from the Hub, so that it is there.
        make_card: the card's text, from repository id and the base to link or None.
        warnings: what the user should know, one plain sentence each.
    """

    folder: Path
    kind: Kind
    files: Mapping[str, Path]
    base_model: str | None
    verified_base: bool
    make_card: Callable[[str, str | None], str]
    warnings: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Size of the files."""
        return sum(path.stat().st_size for path in self.files.values())

    def card(self, repo_id: str, base: str | None) -> str:
        """The card's text.

        Raises:
            UsageError: `psoft_export.json` lacks what a card says.
        """
        try:
            return self.make_card(repo_id, base)
        except (KeyError, TypeError, ValueError, AttributeError) as cause:
            raise UsageError(
                f"{self.folder / FILENAME}: is not as psoft-export writes it "
                f"({type(cause).__name__}: {first_line(cause)}); make the folder again"
            ) from cause


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    overwrite_card: bool = False,
    token: str | None = None,
) -> PushReport:
    """Publish a folder that psoft-export wrote, or a PSOFT adapter, on the Hub.

    One commit holds everything, with a model card made from `psoft_export.json`. Run again after
    a failure, it sends only what is not up yet. Progress bars are those of `huggingface_hub`.

    Args:
        folder: a merged checkpoint, a LoRA adapter from `to_lora`, or a PSOFT adapter, with its
            basis record or without.
        repo_id: repository, as `owner/name` or as `name` of your own; made if it does not exist.
        private: make it private; None: as your account has it. An existing one stays as it is.
        revision: branch to push to, made if it does not exist; or `refs/pr/N`. Default: `main`.
        create_pr: open a pull request (against `revision`) instead of changing the branch.
        commit_message: first line of the commit.
        overwrite_card: make the card anew even where somebody wrote one.
        token: a Hub token; by default the one that `hf auth login` stored.

    Raises:
        UsageError: the folder is not one that can be published, or an option cannot be used.
        NotEquivalentError: the folder was checked, and is not what base and adapter mean.
        CheckpointError: its weights are incomplete or damaged; AdapterError, RecordError for
            those of an adapter.
        HubError: the Hub refuses, or cannot be reached.

    Example:
        >>> report = psoft_export.push("merged", "me/merged", private=True)
        >>> report.url
    """
    publication = read_publication(folder)
    own_card = None if overwrite_card else _own_card(publication.folder)
    additions = _additions(publication)
    repo_id = prepare_push(repo_id, private=private, token=token)
    api = HfApi(token=token)
    with _speaking_of(repo_id):
        there = _at_revision(api, repo_id, revision, may_create=not create_pr)
        card = _card(api, publication, own_card, there, overwrite=overwrite_card)
        if card is not None:
            additions.append(CommitOperationAdd(CARD, card.encode()))
        removed = _shadowing(there, publication.files)
        info = api.create_commit(
            repo_id,
            [*additions, *(CommitOperationDelete(name) for name in removed)],
            commit_message=commit_message or _MESSAGES[publication.kind],
            revision=revision,
            create_pr=create_pr,
            parent_commit=there.sha,  # what the card and the removals were decided on
        )
    kept = card is None or own_card is not None
    return PushReport(
        repo_id=repo_id,
        url=info.pr_url or info.commit_url,
        commit=info.oid,
        pull_request=info.pr_url,
        files=tuple(sorted({*publication.files, CARD})),
        removed=removed,
        card="kept" if kept else "written",
        warnings=(*publication.warnings, *(_kept_warning(own_card, kept=kept))),
    )


def prepare_push(repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Make the repository unless it exists, so that a refusal comes before any long work.

    Returns:
        The repository's id with its owner.

    Raises:
        UsageError: not a possible id or token.
        HubError: the Hub refuses, cannot be reached, or has it public where `private` is asked.
    """
    if not is_valid_id(repo_id):
        raise UsageError(
            f"{repo_id}: not a valid Hub id (owner/name); a branch is named with --revision"
        )
    checked_token(token)
    if constants.HF_HUB_OFFLINE:
        raise HubError(f"{repo_id}: HF_HUB_OFFLINE is set; unset it to push")
    api = HfApi(token=token)
    with _speaking_of(repo_id):
        full_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if private and not api.model_info(full_id).private:
            raise HubError(
                f"{full_id}: exists and is public; make it private in its settings on the Hub, "
                "or leave --private away"
            )
    return full_id


def read_publication(folder: str | Path) -> Publication:
    """Find out what a folder holds, and check that it is complete. Asks nothing of the Hub.

    Raises:
        UsageError: nothing that psoft-export publishes, or a link leads out of the folder.
        NotEquivalentError: as of `push`; likewise CheckpointError, AdapterError, RecordError.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UsageError(f"{folder}: no such folder")
    files = _files(root)
    if FILENAME in files:
        return _written_here(root, files)
    if CONFIG in files:
        return _psoft_adapter(root, files)
    raise UsageError(
        f"{root}: has no {FILENAME}, so psoft-export did not write it, and is no PSOFT adapter; "
        "name a folder that merge, lora or convert wrote"
    )


def _written_here(root: Path, files: dict[str, Path]) -> Publication:
    manifest = _json(files[FILENAME])
    version = manifest.get("format_version")
    if manifest.get("format") != "psoft-export" or version != FORMAT_VERSION:
        raise UsageError(
            f"{files[FILENAME]}: format {manifest.get('format')!r}, version {version!r}; this "
            f"version of psoft-export publishes 'psoft-export', {FORMAT_VERSION}"
        )
    _check_verdict(root, manifest)
    base = manifest.get("base") or {}
    from_hub = base.get("kind") == "hub" and is_hub_id(base.get("name"))
    linked = base["name"] if from_hub else (manifest.get("adapter") or {}).get("base_model")
    linked = linked if is_hub_id(linked) else None
    if CONFIG in files:
        config = _json(files[CONFIG])
        read_header(root / SAFETENSORS, AdapterError)
        _check_unchanged(root, {SAFETENSORS}, manifest)
        return Publication(
            root,
            "lora",
            files,
            linked,
            from_hub,
            lambda repo_id, link: lora_card(manifest, config, files, repo_id, link),
            _path_warning(config),
        )
    if companions.CONFIG not in files:
        raise CheckpointError(f"{root / companions.CONFIG}: no such file; make the folder again")
    loaded = {file.name for file in open_checkpoint(root).files}
    _check_unchanged(root, loaded, manifest)
    return Publication(
        root,
        "merged",
        files,
        linked,
        from_hub,
        lambda repo_id, link: merged_card(manifest, files, repo_id, link),
        (),
    )


def _psoft_adapter(root: Path, files: dict[str, Path]) -> Publication:
    # Only what belongs to an adapter: a Trainer's folder holds optimizer states and pickles too.
    files = {name: files[name] for name in adapter_files(files)}
    summary = inspect(root)
    if not summary.needs_record:
        raise UsageError(
            f"{root}: {summary.method}: push takes adapters in PEFT's PSOFT format; merge or "
            "convert this one, and push what that writes"
        )
    config = _json(files[CONFIG])
    warnings = _path_warning(config)
    if summary.record is None:
        warnings += (
            "the adapter has no basis record; 'psoft-export record' on the machine that trained "
            "makes one, and without it others may compute another model",
        )
    return Publication(
        root,
        "adapter",
        files,
        named_base(config),
        False,
        lambda repo_id, link: adapter_card(summary, config, repo_id, link),
        warnings,
    )


def _files(root: Path) -> dict[str, Path]:
    """Every file to publish, by its name in the repository: none hidden, none a lock, no card."""
    found: dict[str, Path] = {}
    for place, folders, names in os.walk(root):
        here = Path(place)
        folders[:] = sorted(f for f in folders if not f.startswith(".") and f not in _LEFT_HERE)
        names = [n for n in names if not n.startswith(".") and not n.endswith(".lock")]
        for path in (here / name for name in (*folders, *names)):
            if path.is_symlink() and not path.resolve().is_relative_to(root.resolve()):
                raise UsageError(f"{path}: is a link that leads out of the folder; not published")
        found |= {str((here / n).relative_to(root)): here / n for n in names}
    found.pop(CARD, None)
    return dict(sorted(found.items()))


def _additions(publication: Publication) -> list[CommitOperationAdd]:
    try:
        return [CommitOperationAdd(name, path) for name, path in publication.files.items()]
    except (OSError, ValueError) as cause:
        raise UsageError(
            f"{publication.folder}: not every file can be read ({first_line(cause)})"
        ) from cause


def _check_verdict(root: Path, manifest: Mapping[str, Any]) -> None:
    for level, verdict in (manifest.get("verification") or {}).items():
        if isinstance(verdict, Mapping) and verdict.get("equivalent") is False:
            raise NotEquivalentError(
                f"{root}: by its {FILENAME} it is not what base and adapter mean ({level}); not "
                "published. Merge again, or see 'psoft-export verify'"
            )


def _check_unchanged(root: Path, loaded: set[str], manifest: Mapping[str, Any]) -> None:
    """The weights that a loader takes must be the bytes that were written and checked."""
    written: Mapping[str, str] = manifest.get("files") or {}
    for name in sorted(loaded | written.keys()):
        path = root / name
        if name not in written:
            why = "is not what psoft-export wrote here"
        elif name not in loaded:
            why = "is missing, or other weights are loaded in its place"
        elif file_sha256(path, CheckpointError) != written[name]:
            why = "has been changed since psoft-export wrote it"
        else:
            continue
        raise NotEquivalentError(
            f"{path}: {why}, so what {FILENAME} says no longer holds; not published. Make the "
            "folder again"
        )


def _own_card(root: Path) -> str | None:
    """The card that somebody wrote into the folder, or None.

    Raises:
        UsageError: it is not readable, or names a base that is no Hub id, so a path of this
            machine perhaps.
    """
    path = root / CARD
    if not path.is_file():
        return None
    try:
        text = path.read_bytes().decode("utf-8")
        named = (metadata_load(path) or {}).get("base_model")
    except Exception as cause:  # YAML has a family of errors of its own
        raise UsageError(
            f"{path}: not a readable model card ({first_line(cause)}); correct it, or pass "
            "--overwrite-card"
        ) from cause
    if not is_handwritten(text):
        return None
    for name in named if isinstance(named, list) else [named]:
        if name is not None and not is_valid_id(name):
            raise UsageError(
                f"{path}: its base_model '{name}' is not a Hub id; correct it, or pass "
                "--overwrite-card"
            )
    return text


def _card(
    api: HfApi,
    publication: Publication,
    own: str | None,
    there: ModelInfo,
    *,
    overwrite: bool,
) -> str | None:
    """The card to commit; None where the repository's own stays."""
    if own is not None:
        return own
    if not overwrite and CARD in _names(there):
        path = hf_hub_download(there.id, CARD, revision=there.sha, token=api.token)
        if is_handwritten(Path(path).read_text("utf-8", errors="replace")):
            return None
    base = publication.base_model
    if base is not None and not publication.verified_base and not _exists(api, base):
        base = None  # a relative path that looks like an id, perhaps
    return publication.card(there.id, base)


def _exists(api: HfApi, repo_id: str) -> bool:
    try:
        api.model_info(repo_id)
    except RepositoryNotFoundError:
        return False
    return True


def _at_revision(api: HfApi, repo_id: str, revision: str | None, *, may_create: bool) -> ModelInfo:
    """The repository at the branch to push to, which is made if need be."""
    try:
        return api.model_info(repo_id, revision=revision)
    except RevisionNotFoundError:
        named = revision is not None and not revision.startswith("refs/")
        if not (may_create and named) or _COMMIT.fullmatch(str(revision)):
            raise
    api.create_branch(repo_id, branch=str(revision), exist_ok=True)
    return api.model_info(repo_id, revision=revision)


def _shadowing(there: ModelInfo, files: Mapping[str, Path]) -> tuple[str, ...]:
    """Files of the repository that would be loaded in place of, or along with, those pushed."""
    return tuple(n for n in sorted(_names(there)) if _LOADED.fullmatch(n) and n not in files)


def _names(there: ModelInfo) -> set[str]:
    return {sibling.rfilename for sibling in there.siblings or []}


def _kept_warning(own: str | None, *, kept: bool) -> tuple[str, ...]:
    if not kept or own is not None:
        return ()
    return (
        f"the repository's own {CARD} stays, and may speak of other files; --overwrite-card "
        "replaces it",
    )


def _path_warning(config: Mapping[str, Any]) -> tuple[str, ...]:
    named = config.get("base_model_name_or_path")
    if named is None or is_valid_id(named):
        return ()
    return (
        f"{CONFIG} names the base by a path, '{named}', which is published with it and "
        "means nothing elsewhere; set 'base_model_name_or_path' to a Hub id",
    )


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as cause:
        raise UsageError(f"{path}: not readable JSON ({first_line(cause)})") from cause
    if not isinstance(content, dict):
        raise UsageError(f"{path}: not a JSON object")
    return content


@contextmanager
def _speaking_of(repo_id: str) -> Iterator[None]:
    """Turn what the Hub, its library and the network raise into one line."""
    try:
        yield
    except PsoftExportError:
        raise
    except Exception as cause:
        # The library wraps what broke an upload.
        root = cause.__cause__ if type(cause) is RuntimeError and cause.__cause__ else cause
        problem = hub_problem(root)
        if problem is None and isinstance(root, (ValueError, RuntimeError)):
            problem = " ".join(str(root).split())  # metadata refused, or hf_xet's own words
        if problem is None:
            raise
        raise HubError(f"{repo_id}: {problem}") from cause
