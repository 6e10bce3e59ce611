"""The one error a user is meant to read, and what it becomes where several processes work together."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: it names the file, tensor or option, and says the mend. The command line prints
    it and exits with code 2; everything else that is raised is a programming error and keeps its traceback.
    """


class TogetherError(InputError):
    """An InputError that is raised in all processes of this run: the first of them says it."""


class RankLostError(InputError):
    """Another process of this run is gone. Each of those that are left says so."""
