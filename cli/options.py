"""Options that several commands share, each named once."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

BaseOption = Annotated[
    str,
    typer.Option("--base", help="Base checkpoint: a folder or a Hub id, with @revision or not."),
]
AdapterOption = Annotated[
    str,
    typer.Option("--adapter", help="Adapter: a folder or a Hub id, with @revision or not."),
]
OutputOption = Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace a non-empty output folder.")
]
TokenOption = Annotated[
    str | None,
    typer.Option("--token", help="Hub token; by default HF_TOKEN, or the one of 'hf auth login'."),
]
DeviceOption = Annotated[
    str, typer.Option("--device", help="auto (CUDA when there is one), cpu, cuda or cuda:N.")
]
QuietOption = Annotated[
    bool, typer.Option("--quiet", "-q", help="Print nothing but warnings and errors.")
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="Print one JSON object on stdout, everything else on stderr.")
]
_OTHER_FORMATS = "Formats that do not say all of it"
NeumannTermsOption = Annotated[
    str | None,
    typer.Option(
        "--neumann-terms",
        metavar="N|exact",
        help="PSOFT paper's checkpoints: terms of the Cayley–Neumann series; default: 5.",
        rich_help_panel=_OTHER_FORMATS,
    ),
]
GivensOption = Annotated[
    Literal["reference", "paper"] | None,
    typer.Option(
        "--givens",
        help="qGOFT: as its code computes (reference, the default) or as the paper says.",
        rich_help_panel=_OTHER_FORMATS,
    ),
]
SvdDeviceOption = Annotated[
    str | None,
    typer.Option(
        "--svd-device",
        help="Without a basis record: cpu or cuda, where training computed its SVD.",
    ),
]
RequireRecordOption = Annotated[
    bool, typer.Option("--require-record", help="Refuse an adapter without a basis record.")
]
CacheDirOption = Annotated[
    Path | None,
    typer.Option("--cache-dir", help="Cache of bases; default: PSOFT_EXPORT_CACHE, or the user's."),
]
TextOption = Annotated[
    Path | None,
    typer.Option("--text", help="UTF-8 text to compare outputs on; default: random tokens."),
]
ReportOption = Annotated[
    Path | None,
    typer.Option("--report", metavar="FILE.html", help="Write the verdict as one HTML page."),
]
SummaryOption = Annotated[
    Path | None,
    typer.Option("--summary", metavar="FILE.md", help="Write the verdict as Markdown."),
]
NoCacheOption = Annotated[
    bool, typer.Option("--no-cache", help="Neither read nor write the cache of bases and layouts.")
]


def neumann_terms(text: str | None) -> Any:
    """What `--neumann-terms` says, a number where it is one; the package refuses the rest."""
    try:
        return int(text) if text is not None else None
    except ValueError:
        return text


_PUBLISHING = "Publishing"
PushToOption = Annotated[
    str | None,
    typer.Option(
        "--push-to",
        metavar="REPO_ID",
        help="Then publish the folder in this Hub repository, with a model card.",
        rich_help_panel=_PUBLISHING,
    ),
]
PrivateOption = Annotated[
    bool,
    typer.Option(
        "--private",
        help="Make the repository private; a public one that exists is refused.",
        rich_help_panel=_PUBLISHING,
    ),
]
RevisionOption = Annotated[
    str | None,
    typer.Option(
        "--revision",
        metavar="BRANCH",
        help="Branch to push to, made if it does not exist; default: main.",
        rich_help_panel=_PUBLISHING,
    ),
]
CreatePrOption = Annotated[
    bool,
    typer.Option(
        "--create-pr",
        help="Open a pull request in place of changing the branch.",
        rich_help_panel=_PUBLISHING,
    ),
]
CommitMessageOption = Annotated[
    str | None,
    typer.Option("--commit-message", help="First line of the commit.", rich_help_panel=_PUBLISHING),
]
OverwriteCardOption = Annotated[
    bool,
    typer.Option(
        "--overwrite-card",
        help="Make the model card anew even where somebody wrote one.",
        rich_help_panel=_PUBLISHING,
    ),
]
