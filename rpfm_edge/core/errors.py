"""Errors that a user can act on: what is wrong, what was expected, what to do."""

from __future__ import annotations

import sys


class RpfmError(Exception):
    """Base of every error caused by input, files, configuration or the machine (CLI exit code 2).

    Args:
        problem: what is wrong, naming the culprit.
        expected: what would have been right.
        fix: what the user does next.
    """

    def __init__(self, problem: str, *, expected: str, fix: str) -> None:
        self.problem, self.expected, self.fix = problem, expected, fix
        super().__init__(f"{problem}: expected {expected}; {fix}.")


class InputError(RpfmError):
    """An image, a pose or a data set that cannot be used."""


class ConfigError(RpfmError):
    """An unknown option, preset or recipe key, or a value out of range."""


class ArtifactError(RpfmError):
    """A missing, damaged or wrong kind of artifact."""


class SignatureError(RpfmError):
    """A tensor whose name, shape or dtype does not fit the graph."""


class BackendError(RpfmError):
    """A backend that is unknown, not installed, or refuses the graph."""


class ParityError(RpfmError):
    """Two implementations of the same graph that disagree by more than the tolerance."""


def warn(text: str) -> None:
    """Say on standard error what the user should know, although it ends nothing."""
    print(f"rpfm-edge: {text}.", file=sys.stderr, flush=True)
