"""The one exception that means "the input is wrong", not "the program is wrong"."""


class UserError(Exception):
    """Bad input: what is wrong, where, and what would be right, in one line.

    The command line prints the text on stderr and exits with code 2, without a
    traceback. Every other exception is a bug and keeps its traceback.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


class RunFailed(Exception):
    """A run that cannot go on, through no fault of its input or of the program.

    The command line prints the text on stderr and exits with code 1.
    """
