"""Every error that a user can cause or meet, and the exit code each one becomes.

One hierarchy; the command line turns it into one line and a code in one place (`cli.main`).
"""


class PsoftExportError(Exception):
    """Base of all errors of this package: one line that says what, where, and the way out."""

    exit_code = 1


def first_line(cause: BaseException) -> str:
    """The first line of an exception's message, or its kind where it has none."""
    return next(iter(str(cause).splitlines()), type(cause).__name__)


class UsageError(PsoftExportError):
    """An option or argument has a value that cannot be used."""

    exit_code = 2


class AdapterError(PsoftExportError):
    """The adapter's files are missing, unreadable or malformed."""

    exit_code = 3


class CheckpointError(PsoftExportError):
    """A checkpoint's files (the base's, a merged one's) are missing, unreadable or malformed."""

    exit_code = 4


class MismatchError(PsoftExportError):
    """Adapter and base are each sound, but do not fit each other."""

    exit_code = 5


class UnsupportedError(PsoftExportError):
    """What is asked has no exact answer here (tied, quantized, not linear, unknown model)."""

    exit_code = 6


class NonFiniteError(PsoftExportError):
    """A tensor of the adapter, the base or the result holds NaN or infinity."""

    exit_code = 7


class OutputError(PsoftExportError):
    """The output folder exists, cannot be written, or is in use by another run."""

    exit_code = 8


class DiskSpaceError(OutputError):
    """The output's file system has too little room."""

    exit_code = 9


class HubError(PsoftExportError):
    """A Hub repository does not exist, refuses access, or cannot be reached."""

    exit_code = 10


class MissingExtraError(PsoftExportError):
    """An optional package is needed and not installed."""

    exit_code = 11


class RecordError(PsoftExportError):
    """A basis record is damaged, of another version, or belongs to another adapter."""

    exit_code = 12


class RecordMissingError(PsoftExportError):
    """`--require-record` was given, and the adapter has no basis record."""

    exit_code = 13


class NotEquivalentError(PsoftExportError):
    """A checkpoint is not what its base and adapter mean.

    `report` is the `VerificationReport` that says in what, where the verification came to its end.
    """

    exit_code = 14

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class NotRecoveredError(PsoftExportError):
    """The signs of an adapter could not be recovered from the data, or not at all.

    `report` is the `RecoveryReport`.
    """

    exit_code = 16

    def __init__(self, message: str, report: object = None) -> None:
        super().__init__(message)
        self.report = report


class PartlyRecoveredError(NotRecoveredError):
    """Some of the signs were recovered, too few to trust the adapter with them."""

    exit_code = 15
