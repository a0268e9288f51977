"""Pages of one file: templates that need nothing else."""

from __future__ import annotations

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from namr_dist.text import printable


def template(name: str) -> Template:
    """One of gallery/templates/. Whatever is put into it is escaped and made harmless."""
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: printable(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    ).get_template(name)
