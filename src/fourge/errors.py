"""The one error a user is meant to read."""


class InputError(ValueError):
    """What the user gave cannot be used.

    The message is one line: it names the file, tensor or option, and says the mend. The command line prints
    it and exits with code 2; everything else that is raised is a programming error and keeps its traceback.
    """
