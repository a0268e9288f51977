"""From a finished run: figures, report, comparison, export."""
