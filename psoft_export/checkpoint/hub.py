"""Speaking with the Hub: what a valid id and token are, and what went wrong, in one line."""

import errno
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from psoft_export.errors import HubError, UsageError, first_line

_TOKEN = re.compile(r"[!-~]+")
_BUSY = (408, 429)


def is_valid_id(text: object) -> bool:
    """Whether a text is a possible Hub id: `owner/name`, or `name` alone."""
    if not isinstance(text, str):
        return False
    try:
        validate_repo_id(text)
    except HFValidationError:
        return False
    return True


def is_hub_id(text: object) -> bool:
    """Whether a text is a possible Hub id with its owner, which no folder's own name is."""
    return is_valid_id(text) and "/" in str(text)


def checked_token(token: str | None) -> str | None:
    """The token, if it can be one.

    A library would quote any other in its error message.

    Raises:
        UsageError: it holds spaces, line breaks or other characters that no token has.
    """
    if token is not None and not _TOKEN.fullmatch(token):
        raise UsageError(
            "--token: is empty or holds characters that no Hub token has; copy it anew"
        )
    return token


def snapshot_of(
    repo_id: str,
    revision: str | None,
    config: str,
    choose_files: Callable[[Iterable[str]], list[str]],
    *,
    token: str | None = None,
) -> Path:
    """The folder in the Hub cache of a repository, whose name is the commit.

    Arguments as of `source.resolve`, the revision apart from the id.

    Raises:
        UsageError: the token cannot be one.
        HubError: the repository cannot be had.
    """
    token = checked_token(token)
    try:
        if constants.HF_HUB_OFFLINE:
            return _cached_snapshot(repo_id, config, revision)
        info = HfApi(token=token).model_info(repo_id, revision=revision)
        files = choose_files([sibling.rfilename for sibling in info.siblings or []])
        patterns = [_literal(name) for name in files]
        return Path(
            snapshot_download(repo_id, revision=revision, allow_patterns=patterns, token=token)
        )
    except Exception as cause:
        if (problem := hub_problem(cause)) is None:
            raise
        name = f"{repo_id}@{revision}" if revision else repo_id
        raise HubError(f"{name}: no such folder here; on the Hub: {problem}") from cause


def _cached_snapshot(repo_id: str, config: str, revision: str | None) -> Path:
    path = try_to_load_from_cache(repo_id, config, revision=revision)
    if not isinstance(path, str):
        raise FileNotFoundError(config)
    return Path(path).parent


def _literal(name: str) -> str:
    """A file name as an `allow_patterns` entry that matches nothing else."""
    return re.sub(r"([*?\[])", r"[\1]", name)


def hub_problem(cause: BaseException) -> str | None:
    """What went wrong with the Hub, without the request's headers; None: it was something else."""
    if isinstance(cause, GatedRepoError):
        return "access is gated; accept its terms on the Hub and log in with 'hf auth login'"
    if isinstance(cause, RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(cause, RepositoryNotFoundError):
        return (
            "no such Hub repository (or a private one); check the name, or log in with "
            "'hf auth login'"
        )
    if isinstance(cause, HFValidationError):
        return "not a valid Hub id (owner/name)"
    if isinstance(cause, HfHubHTTPError) and cause.response is not None:
        return _refusal(cause.response.status_code, cause.server_message)
    if type(cause).__name__ == "XetAuthenticationError":  # hf_xet is not installed everywhere
        return _refusal(401, None)
    if constants.HF_HUB_OFFLINE:
        return "not in the Hub cache, and HF_HUB_OFFLINE forbids to ask"
    if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EACCES):
        return f"the Hub cache cannot be written ({cause.strerror})"
    if isinstance(cause, (LocalEntryNotFoundError, OSError)) or (
        type(cause).__module__.partition(".")[0].startswith("http")
    ):
        return "the Hub cannot be reached; check the network"
    return None


def _refusal(status: int, message: str | None) -> str:
    said = f": {first_line(ValueError(message))}" if message else ""
    if status == 401:
        return "the Hub refuses the token (401), or needs one; log in with 'hf auth login'"
    if status == 403:
        return f"the token may not do this (403{said}); log in with one that may ('hf auth login')"
    if status in (409, 412):
        return f"the repository was changed meanwhile ({status}{said}); run it again"
    if status >= 500 or status in _BUSY:
        return f"the Hub answered {status}; try again later"
    return f"the Hub refuses this ({status}{said})"
