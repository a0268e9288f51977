"""The one exception that commands turn into a single line for the user."""


class InputError(ValueError):
    """Bad input, told to the user in one line: what, which value, what to do."""
