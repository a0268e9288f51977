"""What a download looks like: one module a data set, each making a Listing of it."""
