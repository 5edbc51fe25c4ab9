"""The one exception type for mistakes that the user can mend."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in what the user gave: the message says what is wrong, where, and what to do.

    Commands print the message without a traceback and exit with status 2.
    """


class SharedUserError(UserError):
    """A UserError that every rank raises, so that each may end by itself and one of them may tell."""
