"""`psoft-export cache`: what is kept on disk, listed and removed."""

from datetime import datetime
from typing import TYPE_CHECKING

import typer
from rich.console import Console
from rich.table import Table

from psoft_export.cli.options import CacheDirOption, JsonOption, QuietOption
from psoft_export.cli.output import Output, size

if TYPE_CHECKING:
    from psoft_export.cache import BasisCache, CacheEntry

EXAMPLES = """
[bold]Examples[/]

  psoft-export cache list

  psoft-export cache clear --cache-dir /scratch/bases
"""

app = typer.Typer(
    help="List or remove the bases that merges keep on disk.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.command("list", epilog=EXAMPLES)
def list_command(cache_dir: CacheDirOption = None, as_json: JsonOption = False) -> None:
    """List the bases in the cache, the most recently used first."""
    out = Output(as_json=as_json)
    from psoft_export.cache import open_cache

    cache = open_cache(cache_dir)
    entries = cache.entries()
    data = {
        "folder": str(cache.folder),
        "limit_bytes": cache.limit_bytes,
        "bytes": sum(entry.nbytes for entry in entries),
        "entries": [
            {
                "weight": entry.weight,
                "shape": list(entry.shape),
                "rank": entry.rank,
                "solver": entry.solver,
                "bytes": entry.nbytes,
                "last_used": _local_time(entry).isoformat(timespec="seconds"),
                "file": entry.path.name,
            }
            for entry in entries
        ],
    }
    out.result(data, lambda console: _print_entries(console, cache, entries))


@app.command("clear", epilog=EXAMPLES)
def clear_command(
    cache_dir: CacheDirOption = None, quiet: QuietOption = False, as_json: JsonOption = False
) -> None:
    """Remove every basis, layout, hash and interrupted search; merges make what they need."""
    out = Output(quiet=quiet, as_json=as_json)
    from psoft_export.cache import open_cache

    cache = open_cache(cache_dir)
    freed = cache.clear()
    out.result(
        {"folder": str(cache.folder), "freed_bytes": freed},
        lambda console: console.print(
            f"{size(freed)} freed in {cache.folder}", markup=False, highlight=False
        ),
    )


def _print_entries(console: Console, cache: "BasisCache", entries: "list[CacheEntry]") -> None:
    table = Table(box=None)
    table.add_column("weight", no_wrap=True)
    for column in ("shape", "rank"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("solver", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("last used", no_wrap=True)
    for entry in entries:
        table.add_row(
            entry.weight[:12],
            " × ".join(map(str, entry.shape)),
            str(entry.rank),
            entry.solver,
            size(entry.nbytes),
            f"{_local_time(entry):%Y-%m-%d %H:%M:%S}",
        )
    if entries:
        console.print(table)
    total = size(sum(entry.nbytes for entry in entries))
    console.print(
        f"{len(entries)} bases, {total} of at most {size(cache.limit_bytes)}, in {cache.folder}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _local_time(entry: "CacheEntry") -> datetime:
    return datetime.fromtimestamp(entry.last_used).astimezone()
