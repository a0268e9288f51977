"""A gallery over HTTP: the service and its page."""
