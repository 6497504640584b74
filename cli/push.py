"""`psoft-export push`, and pushing what another command just wrote."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from psoft_export.cli.options import (
    CommitMessageOption,
    CreatePrOption,
    JsonOption,
    OverwriteCardOption,
    PrivateOption,
    QuietOption,
    RevisionOption,
    TokenOption,
)
from psoft_export.cli.output import Output, size
from psoft_export.errors import PsoftExportError, UsageError

if TYPE_CHECKING:
    from psoft_export import PushReport

EXAMPLES = """
[bold]Examples[/]

  psoft-export push ./merged me/merged --private

  psoft-export push ./merged me/merged --revision v2

  psoft-export push ./adapter someone/adapter --create-pr

  psoft-export push ./merged me/merged --dry-run
"""


def push_command(
    folder: Annotated[
        Path, typer.Argument(help="What merge, lora or convert wrote, or a PSOFT adapter.")
    ],
    repo_id: Annotated[
        str, typer.Argument(metavar="REPO_ID", help="owner/name; made if it does not exist.")
    ],
    private: PrivateOption = False,
    revision: RevisionOption = None,
    create_pr: CreatePrOption = False,
    commit_message: CommitMessageOption = None,
    overwrite_card: OverwriteCardOption = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Print files and card; ask nothing of the Hub."),
    ] = False,
    token: TokenOption = None,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Publish a folder on the Hub, with a model card.

    Everything goes into one commit. After a failure, the same command again sends what is missing.
    """
    out = Output(quiet=quiet, as_json=as_json)  # before the Hub library reads its settings
    if dry_run:
        _preview(out, folder, repo_id)
        return
    upload = Upload(repo_id, private, revision, create_pr, commit_message, overwrite_card, token)
    report = upload.carry_out(out, folder)
    out.result(report.to_dict(), lambda console: print_push(console, report))


@dataclass(frozen=True)
class Upload:
    """A push that was asked for."""

    repo_id: str
    private: bool
    revision: str | None
    create_pr: bool
    commit_message: str | None
    overwrite_card: bool
    token: str | None

    @classmethod
    def asked(
        cls,
        push_to: str | None,
        private: bool,
        revision: str | None,
        create_pr: bool,
        commit_message: str | None,
        overwrite_card: bool,
        token: str | None,
    ) -> "Upload | None":
        """The push that a command's options ask for, or None.

        Raises:
            UsageError: options of a push without `--push-to`.
        """
        if push_to is not None:
            how = (private, revision, create_pr, commit_message, overwrite_card)
            return cls(push_to, *how, token)
        given = {
            "--private": private,
            "--revision": revision,
            "--create-pr": create_pr,
            "--commit-message": commit_message,
            "--overwrite-card": overwrite_card,
        }
        if names := [name for name, value in given.items() if value]:
            raise UsageError(f"{', '.join(names)}: only with --push-to")
        return None

    def prepare(self) -> None:
        """Let the Hub refuse name and token before the work, not after it."""
        from psoft_export.publishing import prepare_push

        prepare_push(self.repo_id, private=self.private or None, token=self.token)

    def carry_out(self, out: Output, folder: Path) -> "PushReport":
        """Push a folder."""
        from psoft_export import push

        out.note(f"pushing {folder} to {self.repo_id}")
        report = push(
            folder,
            self.repo_id,
            private=self.private or None,
            revision=self.revision,
            create_pr=self.create_pr,
            commit_message=self.commit_message,
            overwrite_card=self.overwrite_card,
            token=self.token,
        )
        for warning in report.warnings:
            out.warn(warning)
        return report

    def finish(self, out: Output, folder: Path) -> "PushReport":
        """Push the folder that this run wrote; an error says that it is there."""
        again = f"{folder} is complete; push it with: psoft-export push {folder} {self.repo_id}"
        try:
            return self.carry_out(out, folder)
        except PsoftExportError as error:
            raise type(error)(f"{error}. {again}") from error
        except KeyboardInterrupt:
            out.warn(f"the push was interrupted. {again}")
            raise


def with_push(data: dict[str, Any], report: "PushReport | None") -> dict[str, Any]:
    """A command's result, and what was pushed."""
    return data | ({"push": report.to_dict()} if report else {})


def print_push(console: Console, report: "PushReport | None") -> None:
    """Print where a push went; nothing without one."""
    if report is None:
        return
    lines = [f"removed {name} from the repository" for name in report.removed]
    lines.append(f"{len(report.files)} files at {report.url}")
    for line in lines:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def _preview(out: Output, folder: Path, repo_id: str) -> None:
    from psoft_export.publishing import read_publication

    publication = read_publication(folder)
    for warning in publication.warnings:
        out.warn(warning)
    card = publication.card(repo_id, publication.base_model)
    data = {"kind": publication.kind, "files": list(publication.files), "card": card}

    def show(console: Console) -> None:
        console.print(f"{len(publication.files)} files, {size(publication.nbytes)}:")
        for name in publication.files:
            console.print(f"  {name}", markup=False, highlight=False)
        console.print(f"\n{card}", markup=False, highlight=False, soft_wrap=True)

    out.result(data, show)
