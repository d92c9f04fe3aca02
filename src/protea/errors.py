"""The exceptions a user can cause, each with a message that names the value, the place and the fix.

    ProteaError
    ├── UsageError                a wrong option or argument (exit code 2)
    │   └── UnknownModelError
    ├── FastaError                a file that is missing, unreadable or no FASTA
    │   └── DamagedFileError
    ├── StructureError            a structure file that is missing, unreadable or without what was asked for
    ├── UnknownResidueError       a letter outside the model's alphabet
    ├── VariantError              a variant that its protein does not have
    ├── SequenceTooLongError      more tokens than the model has positions
    ├── CheckpointError           weights or configuration that cannot be used
    ├── CapabilityError           the model lacks what was asked of it
    ├── DeviceError               hardware that is not there, or too small
    ├── NonFiniteError            numbers beyond what a type can hold
    ├── TrainingError             a run that cannot begin or go on
    ├── DataError                 training data that contradict themselves, or do not suffice
    │   └── StoreError            a store that is missing, incomplete, damaged or of another alphabet
    ├── ProgramError              another program that is not installed, or failed
    ├── MissingExtraError         an optional part of this package that is not installed
    └── OutputError               a file that cannot be written
        └── ResumeError

Exceptions carry one string and nothing else, so that they survive pickling between processes.
"""

from __future__ import annotations

from typing import ClassVar


class ProteaError(Exception):
    """Base of every error a user can cause; ``exit_code`` is what the command line returns."""

    exit_code: ClassVar[int] = 1


class UsageError(ProteaError, ValueError):
    """An option or argument with a value that cannot be meant."""

    exit_code: ClassVar[int] = 2


class UnknownModelError(UsageError):
    """A model name that is neither published, nor a folder, nor a Hugging Face repository."""


class FastaError(ProteaError):
    """A sequence file that is missing, unreadable, empty or not FASTA."""


class DamagedFileError(FastaError):
    """A compressed file that breaks off or cannot be decompressed further; the records before came out whole."""


class StructureError(ProteaError):
    """A structure file that is missing, unreadable, or holds no protein."""


class UnknownResidueError(ProteaError, ValueError):
    """A residue outside the model's alphabet."""


class VariantError(ProteaError, ValueError):
    """A variant that is spelled wrongly, or that its protein cannot have."""


class SequenceTooLongError(ProteaError, ValueError):
    """A sequence longer than the model's positions allow."""


class CheckpointError(ProteaError):
    """A checkpoint that is missing, truncated, mismatching or of an unsupported kind."""


class CapabilityError(ProteaError):
    """Something asked of a model that has no such head."""


class DeviceError(ProteaError):
    """A device that this machine or this build of PyTorch does not have, or whose memory does not suffice."""


class NonFiniteError(ProteaError, ArithmeticError):
    """Infinities or NaN where there should be numbers, as narrow types give."""


class TrainingError(ProteaError):
    """A training run that cannot begin, or cannot go on."""


class DataError(ProteaError):
    """Training data that contradict themselves, or do not suffice for what was asked."""


class StoreError(DataError):
    """A store of training data that is missing, incomplete, damaged, or of another alphabet."""


class ProgramError(ProteaError):
    """Another program that this one runs and that is not installed, or failed."""


class MissingExtraError(ProteaError, ImportError):
    """A library of an optional part of this package, which is not installed."""


class OutputError(ProteaError):
    """An output file that exists already or cannot be written."""


class ResumeError(OutputError):
    """An unfinished run that cannot go on: other settings, other input, or another process at work on it."""


class ProteaWarning(UserWarning):
    """Something the user should know that does not stop the work."""
