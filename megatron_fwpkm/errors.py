"""The one exception type for mistakes that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: the message says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with status 2.
    """


class SharedUserError(UserError):
    """A UserError that every rank raises, so that each may end by itself and one of them may tell."""


class RankFailedError(RuntimeError):
    """An error of one rank, raised on every rank, so that none waits for one that has gone."""

    def __init__(self, rank: int, what: str, message: str) -> None:
        super().__init__(f"{what} failed on rank {rank}: {message}")
        self.rank = rank
        self.reason = f"failed while {what}: {message}"


class JobFailedError(Exception):
    """The processes of a job ended without finishing it: the message names the first that failed, and why.

    Commands print the message without a traceback and exit with status 1.
    """
