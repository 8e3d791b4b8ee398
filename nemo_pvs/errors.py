"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A mistake that the user can mend: says what is wrong, where, and what to do.

    The command line prints the message as one sentence and exits with code 2; anything else that is raised is a bug
    of ours and keeps its traceback.
    """


class TrainingError(Exception):
    """A training run ended early; says where its log is."""

    exit_code = 1
