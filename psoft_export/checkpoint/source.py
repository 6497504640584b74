"""Where a base or an adapter is: a local folder, or a Hub repository at a commit."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

from psoft_export.checkpoint.hub import checked_token, hub_problem
from psoft_export.errors import HubError, PsoftExportError, UsageError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """A folder on disk and what to call it in reports.

    `name` is the folder's own name for a local folder (never its path, which would publish the
    layout of a machine) and the repository id for a Hub one; `commit` is the Hub commit, or None.
    `scratch` is what removes a temporary folder with the last reference to it, or None, and
    `made_from` the folders that the files in it were made from.
    """

    folder: Path
    name: str
    commit: str | None = None
    scratch: TemporaryDirectory[str] | None = field(default=None, repr=False, compare=False)
    made_from: tuple[Path, ...] = ()

    @property
    def kind(self) -> str:
        """`local` or `hub`."""
        return "local" if self.commit is None else "hub"


def resolve(
    reference: str | Path,
    config: str,
    choose_files: Callable[[Iterable[str]], list[str]],
    *,
    token: str | None = None,
) -> Source:
    """The folder behind a local path or a Hub id with an optional `@revision`.

    From the Hub only the files that `choose_files` picks from the repository's list are fetched,
    into the Hub cache, at one commit. With HF_HUB_OFFLINE set, what the cache has is taken.

    Args:
        reference: a folder, `owner/name` or `owner/name@revision`.
        config: the config file that every such repository has.
        choose_files: from all file names of a repository, those to fetch.
        token: a Hub token; by default the one that `hf auth login` stored.

    Raises:
        UsageError: neither a folder nor a possible Hub id.
        HubError: the repository cannot be had.
    """
    text = str(reference)
    folder = Path(text).expanduser()
    if folder.is_dir():
        return Source(folder, folder.resolve().name)
    repo_id, _, revision = text.partition("@")
    if not _HUB_ID.fullmatch(repo_id) or isinstance(reference, Path):
        raise UsageError(f"{text}: no such folder, and not a Hub id (owner/name[@revision])")
    wanted = revision or None
    token = checked_token(token)
    try:
        if constants.HF_HUB_OFFLINE:
            snapshot = _cached_snapshot(repo_id, config, wanted)
        else:
            info = HfApi(token=token).model_info(repo_id, revision=wanted)
            files = choose_files([sibling.rfilename for sibling in info.siblings or []])
            patterns = [_literal(name) for name in files]
            snapshot = Path(
                snapshot_download(repo_id, revision=wanted, allow_patterns=patterns, token=token)
            )
    except Exception as cause:
        raise _hub_error(text, cause) from cause
    return Source(snapshot, repo_id, snapshot.name)  # the cache names snapshots by commit


def _cached_snapshot(repo_id: str, config: str, revision: str | None) -> Path:
    path = try_to_load_from_cache(repo_id, config, revision=revision)
    if not isinstance(path, str):
        raise FileNotFoundError(config)
    return Path(path).parent


def member(folder: Path, name: str, origin: str, error: type[PsoftExportError]) -> Path:
    """The path of a file that another file names, which must lie inside the folder.

    Args:
        folder: the folder of both files.
        name: the file's name as written in `origin`.
        origin: the name of the file that it was written in, for the message.
        error: class of the error to raise.

    Raises:
        PsoftExportError: of the class `error`: the name is absolute or leads outside.
    """
    path = PurePosixPath(name)
    outside = path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts
    if outside:
        raise error(f"{folder / origin}: names '{name}', a path outside its folder; refused")
    return folder.joinpath(*path.parts)


def _literal(name: str) -> str:
    """A file name as an `allow_patterns` entry that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def _hub_error(reference: str, cause: Exception) -> PsoftExportError:
    """One line for a reference that is no folder and cannot be had from the Hub either."""
    problem = hub_problem(cause)
    if problem is None:
        raise cause
    return HubError(f"{reference}: no such folder here; on the Hub: {problem}")
