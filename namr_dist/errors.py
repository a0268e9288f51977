"""The one exception that commands turn into a single line for the user, and one that its readers
turn into that."""


class InputError(ValueError):
    """Bad input, told to the user in one line: what, which value, what to do."""


class DamagedFileError(ValueError):
    """The bytes of a file are not those that were written. Says how that shows; whoever reads the
    file names it, and the remedy."""
