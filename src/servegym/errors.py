"""Errors that a person can mend: one line that names the source, the field, the value and what is allowed."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input from outside: a config, a trace, a policy name. The command line prints it and exits with 2.

    Args:
        source: where the value came from: a file, ``file:line``, or an option such as ``--policy``.
        field: dotted name of the field or the column, empty if the source as a whole is wrong.
        problem: the value found and what is allowed, as one phrase.

    >>> str(InputError("a.yaml", "cluster.engines", "got -1; allowed: an integer of at least 1"))
    'a.yaml: cluster.engines: got -1; allowed: an integer of at least 1'
    """

    def __init__(self, source: str, field: str, problem: str) -> None:
        self.source = source
        self.field = field
        self.problem = problem
        super().__init__(": ".join(part for part in (source, field, problem) if part))

    def __reduce__(self) -> tuple[type[InputError], tuple[str, str, str]]:
        """Come whole out of a worker process."""
        return type(self), (self.source, self.field, self.problem)


class EngineError(Exception):
    """A live engine did not do its part; the message may have several lines, its last words."""


class WorkerError(Exception):
    """Workers, on this machine or on others, were lost again and again; one line."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a phrase that helps with a misspelt name: the nearest known ones, else all of them.

    >>> nearest("round_robbin", ["round_robin", "random"])
    'did you mean round_robin?'
    >>> nearest("zzz", ["b", "a"])
    'known: a, b'
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    if close:
        return f"did you mean {' or '.join(close)}?"
    return f"known: {', '.join(names)}"
