"""The exceptions that a user can cause, each with a message that names the value, the place and the fix.

Exceptions carry one string and nothing else, so that they survive pickling between processes.
"""

from __future__ import annotations

import sys
import warnings
from typing import ClassVar


class ProteaError(Exception):
    """Base class of every error that a user can cause; ``exit_code`` is the exit code of the command line."""

    exit_code: ClassVar[int] = 1


class UsageError(ProteaError, ValueError):
    """An option or argument has a value that is not allowed."""

    exit_code: ClassVar[int] = 2


class ArgumentError(UsageError):
    """Its message begins with an argument of Python, as in ``token_budget=0: ...``; commands show their option."""


class UnknownModelError(UsageError):
    """A model name is neither published, nor a folder, nor a Hugging Face repository."""


class FastaError(ProteaError):
    """A sequence file is missing, unreadable, empty or not FASTA."""


class DamagedFileError(FastaError):
    """A compressed file is cut short or damaged; the records before the damage were read in full."""


class StructureError(ProteaError):
    """A structure file is missing, unreadable, or holds no protein."""


class UnknownResidueError(ProteaError, ValueError):
    """A residue is outside the model's alphabet."""


class VariantError(ProteaError, ValueError):
    """A variant is spelled wrongly, or its protein cannot have it."""


class SequenceTooLongError(ProteaError, ValueError):
    """A sequence is longer than the model's positions allow."""


class CheckpointError(ProteaError):
    """A checkpoint is missing, truncated, inconsistent or of an unsupported kind."""


class CapabilityError(ProteaError):
    """The model has no head for what was requested."""


class AbsentModuleError(CapabilityError, ImportError):
    """A module of another package, for whose scripts Protea stands in, has no counterpart here."""


class DeviceError(ProteaError):
    """This machine or this build of PyTorch lacks a device, or its memory is too small."""


class NonFiniteError(ProteaError, ArithmeticError):
    """A computation gave infinities or NaN; narrow types do so when they overflow."""


class TrainingError(ProteaError):
    """A training run cannot start or cannot continue."""


class DataError(ProteaError):
    """Training data contradict each other, or are not enough."""


class StoreError(DataError):
    """A training store is missing, incomplete, damaged, or of another alphabet."""


class ProgramError(ProteaError):
    """A program that Protea runs is not installed, or failed."""


class MissingExtraError(ProteaError, ImportError):
    """A library of an optional part of this package is not installed."""


class VersionError(ProteaError, ImportError):
    """A package that Protea needs is too old."""


class OutputError(ProteaError):
    """An output exists already or cannot be written."""


class PartlyFailedError(OutputError):
    """The same command has written the output already, and could not do all that was asked."""


class FinishedError(ProteaError):
    """The same command has written the output already, so that there is nothing to do; the command line succeeds."""

    exit_code: ClassVar[int] = 0


class ResumeError(OutputError):
    """An unfinished run cannot continue: its settings or input changed, or another process works on it."""


class ProteaWarning(UserWarning):
    """Information for the user that does not stop the work."""


def warn(message: str) -> None:
    """Give a ``ProteaWarning`` that names the line outside this package that led here."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("protea."):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, ProteaWarning, stacklevel=level)
