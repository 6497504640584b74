"""Where a base or an adapter is: a local folder, or a Hub repository at a commit."""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory

from psoft_export.errors import PsoftExportError, UsageError

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
    from psoft_export.checkpoint.hub import snapshot_of  # loads the Hub's library: 0.3 s

    snapshot = snapshot_of(repo_id, revision or None, config, choose_files, token=token)
    return Source(snapshot, repo_id, snapshot.name)  # the cache names snapshots by commit


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
