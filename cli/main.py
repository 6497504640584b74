"""The `psoft-export` program: its commands, and the one place where errors become exit codes."""

import atexit
import gc
import os
import sys
import traceback
from contextlib import suppress
from importlib.metadata import version
from typing import Annotated, NoReturn

import typer

from psoft_export.cli import (
    cache,
    combine,
    inspect,
    lora,
    merge,
    onnx,
    push,
    record,
    recover,
    swap,
    verify,
)
from psoft_export.cli.output import print_error
from psoft_export.errors import OutputError, PsoftExportError, UsageError

_INTERRUPTED = 130

app = typer.Typer(
    name="psoft-export",
    help="Take trained PSOFT adapters, and their neighbours, to deployment.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge_command)
app.command("verify", epilog=verify.EXAMPLES)(verify.verify_command)
app.command("lora", epilog=lora.EXAMPLES)(lora.lora_command)
app.command("onnx", epilog=onnx.EXAMPLES)(onnx.onnx_command)
app.command("onnx-adapter", epilog=onnx.ADAPTER_EXAMPLES)(onnx.onnx_adapter_command)
app.command("record", epilog=record.RECORD_EXAMPLES)(record.record_command)
app.command("recover", epilog=recover.EXAMPLES)(recover.recover_command)
app.command("convert", epilog=record.CONVERT_EXAMPLES)(record.convert_command)
app.command("combine", epilog=combine.EXAMPLES)(combine.combine_command)
app.command("swap", epilog=swap.EXAMPLES)(swap.swap_command)
app.command("push", epilog=push.EXAMPLES)(push.push_command)
app.command("inspect", epilog=inspect.EXAMPLES)(inspect.inspect_command)
app.add_typer(cache.app, name="cache")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("psoft-export"))
        raise typer.Exit


@app.callback()
def _root(
    _: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take trained PSOFT adapters to deployment.

    Exit codes are listed in docs/exit-codes.md. Set PSOFT_EXPORT_DEBUG=1 to see tracebacks.
    """


def main() -> None:
    """Run the program; ends the process with its exit code."""
    gc.set_threshold(1_000_000)  # loading torch makes many objects, none of them garbage
    _end(run(sys.argv[1:]))


def _end(code: int) -> NoReturn:
    """End the process at once: to take all of torch's modules apart takes another 0.2 s."""
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # nobody reads it any more
    except OSError as error:
        print_error(f"the output cannot be written ({error.strerror})")
        code = code or OutputError.exit_code
    with suppress(OSError):
        sys.stderr.flush()
    os._exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    debug = bool(os.environ.get("PSOFT_EXPORT_DEBUG"))
    try:
        code = app(arguments, standalone_mode=False)
    except PsoftExportError as error:
        if debug:
            traceback.print_exc()
        print_error(str(error))
        return error.exit_code
    except typer.TyperException as error:
        if message := error.format_message():
            print_error(message)
        return UsageError.exit_code
    except (KeyboardInterrupt, typer.Abort):
        code = _INTERRUPTED
    except Exception as error:
        if debug:
            traceback.print_exc()
        kind = type(error).__name__
        print_error(f"internal error, {kind}: {error} (PSOFT_EXPORT_DEBUG=1 shows where)")
        return PsoftExportError.exit_code
    if code == _INTERRUPTED:  # typer turns Ctrl-C into this code
        print_error("interrupted")
    return code if isinstance(code, int) else 0


if __name__ == "__main__":
    main()
