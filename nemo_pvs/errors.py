"""Exceptions whose message is for the user."""


class UserError(Exception):
    """A mistake that the user can fix; the message says what is wrong, where, and what to do.

    The command line prints the message and exits with code 2; any other exception is a bug of ours and keeps its
    traceback.
    """


class TrainingError(Exception):
    """A training run ended early; the message says where its log is."""

    exit_code = 1
