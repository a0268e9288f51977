"""What a client may ask of the service."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from namr_dist.bounds import above_up_to, at_least, between


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Beyond them a request is refused."""

    body_mib: Annotated[int, between(1, 1024)] = 20
    """of a picture's file"""
    waiting: Annotated[int, at_least(1)] = 32
    """searches at a time, those whose pictures are still being sent included"""
    body_seconds: Annotated[float, above_up_to(0, 3600)] = 60.0
    """in which a picture has to be sent"""

    @property
    def body_bytes(self) -> int:
        """The same as body_mib."""
        return self.body_mib << 20
