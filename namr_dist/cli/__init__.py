"""The `namr` command: `main`, and its verbs by subject."""
