"""The pages: one to search with, and one that describes the service."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from namr_dist.serve.limits import Limits
from namr_dist.text import printable

_FOLDER = Path(__file__).parent / "templates"


class Pages:
    """Their texts. All that they need comes from this service: no other is asked for a script, a
    font or a picture."""

    def __init__(
        self,
        *,
        name: str,
        mode: str,
        model: str,
        pictures: int,
        limits: Limits,
        most_neighbours: int,
    ) -> None:
        self._templates = Environment(
            loader=FileSystemLoader(_FOLDER),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._known = {
            "name": printable(name),
            "mode": printable(mode),
            "model": printable(model),
            "pictures": pictures,
            "limits": limits,
            "most_neighbours": most_neighbours,
        }

    def search(self) -> str:
        """Where a picture is dropped, pasted or chosen."""
        return self._templates.get_template("search.html").render(self._known)

    def description(self, openapi: dict[str, Any]) -> str:
        """What /openapi.json says, for people."""
        return self._templates.get_template("description.html").render(
            self._known, paths=openapi["paths"], schemas=openapi["components"]["schemas"]
        )

    def style(self) -> str:
        """Of both."""
        return (_FOLDER / "page.css").read_text(encoding="utf-8")

    def script(self) -> str:
        """Of the first."""
        return (_FOLDER / "page.js").read_text(encoding="utf-8")
