"""The service's addresses: a search, thumbnails, and the pages that use and describe them."""

from __future__ import annotations

import asyncio
import io
import re
import sys
import warnings
from collections.abc import Callable
from http import HTTPStatus
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from PIL import Image
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from namr_dist import __version__
from namr_dist.data.build.normalise import FORMATS
from namr_dist.data.shardset.shards import MOST_PIXELS
from namr_dist.errors import InputError, ReportedError
from namr_dist.serve.guard import LEFT
from namr_dist.serve.limits import Limits
from namr_dist.serve.pages import Pages
from namr_dist.serve.thumbnails import SIDE, Thumbnail, Thumbnails, thumbnail_of
from namr_dist.serve.worker import BusyError, Worker
from namr_dist.text import say

if TYPE_CHECKING:
    from namr_dist.gallery.gallery import Gallery
    from namr_dist.gallery.items import Hit

MOST_NEIGHBOURS = 100
_RETRY_SECONDS = 2
_KEPT_SECONDS = 300
"""For which a browser shows a thumbnail without asking whether it is still the same."""
_MOST_SHOWN = 60
"""Characters of what a client sent."""


class Neighbour(BaseModel):
    """A picture of the gallery."""

    id: str = Field(description="what the picture is called in the gallery")
    label: str | None = Field(description="its class, where that is known")
    distance: float = Field(description="from the picture that was sent, in the gallery's mode")
    thumbnail: str = Field(description="where its thumbnail is, relative to this address")


class Neighbours(BaseModel):
    """What a search found."""

    gallery: str = Field(description="the gallery's name")
    mode: str = Field(description="the way to search")
    model: str = Field(description="the network that embeds pictures")
    neighbours: list[Neighbour] = Field(description="the nearest pictures, the nearest first")


class Health(BaseModel):
    """A service that answers."""

    status: str = Field(description="ok")
    version: str = Field(description="of namr-dist")
    gallery: str = Field(description="the gallery's name")
    mode: str = Field(description="the way to search")
    model: str = Field(description="the network that embeds pictures")
    pictures: int = Field(description="in the gallery")
    waiting: int = Field(description="searches that are under way")


class Refusal(BaseModel):
    """Why a request was refused."""

    detail: str = Field(description="what is wrong, and what to do")


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def _refusals(**reasons: str) -> dict[int | str, dict[str, Any]]:
    """For the description: status → what it means."""
    return {
        HTTPStatus[name].value: {"model": Refusal, "description": reason}
        for name, reason in reasons.items()
    }


class Service:
    """What the addresses share: the gallery, a thread for searches and one for thumbnails."""

    def __init__(self, gallery: Gallery, limits: Limits) -> None:
        self.gallery = gallery
        self.limits = limits
        self.searches = Worker("search", limits.waiting)
        self._pictures = Worker("pictures", limits.waiting)
        self._thumbnails = Thumbnails()

    async def search(self, request: Request, k: int) -> Neighbours:
        """The answer to a POST. Raises _RefusedError."""
        self._check_head(request)
        try:
            with self.searches.place():
                hits = await self.searches.run(self._hits, await self._body(request), k)
        except BusyError:
            raise _busy(f"{self.limits.waiting} searches are waiting") from None
        gallery = self.gallery
        return Neighbours(
            gallery=gallery.name,
            mode=gallery.mode,
            model=gallery.model.name,
            neighbours=[
                Neighbour(
                    id=hit.id,
                    label=hit.label,
                    distance=hit.distance,
                    # Slashes too: a browser takes `..` out of an address that has them.
                    thumbnail=f"thumbnails/{quote(hit.id, safe='')}",
                )
                for hit in hits
            ],
        )

    async def thumbnail(self, id: str) -> Thumbnail:
        """Of an item. Raises _RefusedError if it is not in the index, or has no picture."""
        kept = self._thumbnails.get(id)
        if kept is not None:
            return kept
        try:
            with self._pictures.place():
                made = await self._pictures.run(lambda: thumbnail_of(self.gallery.picture(id)))
        except BusyError:
            raise _busy("many thumbnails are being made") from None
        except ReportedError as error:
            # What it says may name folders of this machine.
            say(f"no thumbnail of {id!r}: {error}", file=sys.stderr)
            raise _RefusedError(
                HTTPStatus.NOT_FOUND,
                "the gallery has no picture of this id, or it cannot be read any more",
            ) from None
        self._thumbnails.keep(id, made)
        return made

    def _check_head(self, request: Request) -> None:
        """What can be refused before a byte of the picture is read."""
        kind = request.headers.get("content-type", "")
        if not kind.lower().startswith("image/"):
            raise _RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                f"the content type is {kind[:_MOST_SHOWN] or 'missing'}; send the picture's bytes as the body, "
                "with a header such as Content-Type: image/jpeg",
            )
        if request.headers.get("content-encoding", "identity").lower() != "identity":
            raise _RefusedError(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "the body is compressed (Content-Encoding); send the picture's file as it is",
            )
        stated = request.headers.get("content-length", "")
        if stated.isdecimal() and int(stated) > self.limits.body_bytes:
            raise self._too_large()

    async def _body(self, request: Request) -> bytes:
        seconds = self.limits.body_seconds
        try:
            return await asyncio.wait_for(self._parts(request), seconds)
        except asyncio.TimeoutError:
            raise _RefusedError(
                HTTPStatus.REQUEST_TIMEOUT,
                f"the picture did not come within {seconds:g} s; send a smaller one",
                connection="close",
            ) from None

    async def _parts(self, request: Request) -> bytes:
        parts: list[bytes] = []
        size = 0
        async for part in request.stream():
            size += len(part)
            if size > self.limits.body_bytes:
                raise self._too_large()
            parts.append(part)
        return b"".join(parts)

    def _hits(self, body: bytes, k: int) -> list[Hit]:
        """In the thread of searches."""
        _check_picture(body)
        try:
            return self.gallery.search(body, k=k)
        except InputError as error:
            say(f"a picture cannot be read: {error}", file=sys.stderr)
            raise _RefusedError(
                HTTPStatus.UNPROCESSABLE_ENTITY,
                "the picture is damaged or not whole; send its file again",
            ) from None

    def _too_large(self) -> _RefusedError:
        return _RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the picture's file has more than {self.limits.body_mib} MiB; send a smaller one",
        )


def _busy(why: str) -> _RefusedError:
    return _RefusedError(
        HTTPStatus.SERVICE_UNAVAILABLE,
        f"{why}, as many as may; try again in {_RETRY_SECONDS} s",
        retry_after=str(_RETRY_SECONDS),
    )


def _check_picture(body: bytes) -> None:
    """Raise _RefusedError for what is no picture, or too large a one, by its header alone."""
    if not body:
        raise _RefusedError(
            HTTPStatus.UNPROCESSABLE_ENTITY, "the body is empty; send the picture's bytes"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large pictures: the line below is about these
            with Image.open(io.BytesIO(body), formats=FORMATS) as image:
                width, height = image.size
        pixels, size = width * height, f"{width} × {height}"
    except Image.DecompressionBombError as error:  # some 179 million pixels or more
        stated = re.search(r"\d+", str(error))
        pixels, size = MOST_PIXELS + 1, f"{int(stated[0]):,}" if stated else "far too many"
    except MemoryError:
        raise
    except Exception:  # damaged headers raise whatever Pillow's parsers run into
        raise _RefusedError(
            HTTPStatus.UNPROCESSABLE_ENTITY,
            f"what was sent is no picture that can be read; send one of {', '.join(FORMATS)}",
        ) from None
    if pixels > MOST_PIXELS:
        raise _RefusedError(
            HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
            f"the picture has {size} pixels, more than {MOST_PIXELS:,}; send a smaller one",
        )


def make_app(gallery: Gallery, limits: Limits) -> FastAPI:
    """The application over a gallery."""
    service = Service(gallery, limits)
    app = FastAPI(
        title=f"NAMR gallery {gallery.name}",
        version=__version__,
        description="Send a picture, get its nearest neighbours among the pictures of a gallery.",
        # FastAPI's own pages load their scripts from a CDN.
        docs_url=None,
        redoc_url=None,
    )
    _add_errors(app)
    _add_search(app, service)
    _add_pages(app, service)
    return app


def _add_search(app: FastAPI, service: Service) -> None:
    @app.post(
        "/search",
        summary="Find the nearest neighbours of a picture",
        response_model=Neighbours,
        openapi_extra={
            "requestBody": {
                "required": True,
                "description": f"the bytes of a picture's file ({', '.join(FORMATS)})",
                "content": {"image/*": {"schema": {"type": "string", "format": "binary"}}},
            }
        },
        responses=_refusals(
            REQUEST_TIMEOUT="the picture did not come in time",
            REQUEST_ENTITY_TOO_LARGE=f"its file has more than {service.limits.body_mib} MiB, or it has "
            f"more than {MOST_PIXELS:,} pixels",
            UNSUPPORTED_MEDIA_TYPE="the content type is not image/…",
            UNPROCESSABLE_ENTITY="the body is no picture, or k is out of its bounds",
            SERVICE_UNAVAILABLE="too many searches are waiting; Retry-After says when to try again",
        ),
    )
    async def search(
        request: Request,
        k: Annotated[
            int, Query(ge=1, le=MOST_NEIGHBOURS, description="how many neighbours to return")
        ] = 6,
    ) -> Response:
        found = await service.search(request, k)
        return JSONResponse(found.model_dump(), headers={"cache-control": "no-store"})

    @app.get(
        "/thumbnails/{id:path}",
        summary=f"A picture of the gallery as a JPEG of at most {SIDE} pixels a side",
        response_class=Response,
        # Of a parameter of the function FastAPI would say that it may be refused.
        openapi_extra={
            "parameters": [
                {
                    "name": "id",
                    "in": "path",
                    "required": True,
                    "description": "of a neighbour",
                    "schema": {"type": "string"},
                }
            ]
        },
        responses={
            200: {"content": {"image/jpeg": {}}, "description": "the thumbnail"},
            **_refusals(
                NOT_FOUND="the gallery has no picture of this id",
                SERVICE_UNAVAILABLE="too many thumbnails are being made",
            ),
        },
    )
    async def thumbnail(request: Request) -> Response:
        made = await service.thumbnail(request.path_params["id"])
        headers = {"etag": made.etag, "cache-control": f"private, max-age={_KEPT_SECONDS}"}
        if made.etag in request.headers.get("if-none-match", ""):
            return Response(status_code=HTTPStatus.NOT_MODIFIED, headers=headers)
        return Response(made.jpeg, media_type="image/jpeg", headers=headers)

    @app.get("/healthz", summary="Whether the service answers, and for what")
    async def healthz() -> Health:
        gallery = service.gallery
        return Health(
            status="ok",
            version=__version__,
            gallery=gallery.name,
            mode=gallery.mode,
            model=gallery.model.name,
            pictures=len(gallery),
            waiting=service.searches.taken,
        )


def _add_pages(app: FastAPI, service: Service) -> None:
    gallery = service.gallery
    pages = Pages(
        name=gallery.name,
        mode=gallery.mode,
        model=gallery.model.name,
        pictures=len(gallery),
        limits=service.limits,
        most_neighbours=MOST_NEIGHBOURS,
    )

    def serves(address: str, content: Callable[[], str], kind: str) -> None:
        @app.get(address, include_in_schema=False)
        async def page() -> Response:
            return Response(content(), media_type=kind, headers={"cache-control": "no-cache"})

    serves("/", pages.search, "text/html")
    serves("/docs", lambda: pages.description(app.openapi()), "text/html")
    serves("/page.css", pages.style, "text/css")
    serves("/page.js", pages.script, "text/javascript")


def _add_errors(app: FastAPI) -> None:
    """All of them as {"detail": …}, in words."""

    def answer(status: int, detail: str, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"detail": detail}, status_code=status, headers=headers)

    @app.exception_handler(_RefusedError)
    async def refused(_: Request, error: _RefusedError) -> Response:
        return answer(error.status, error.detail, error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        name, value = first["loc"][-1], str(first.get("input"))[:_MOST_SHOWN]
        words = f"{name} is {value!r}; give a whole number from 1 to {MOST_NEIGHBOURS}"
        return answer(HTTPStatus.UNPROCESSABLE_ENTITY, words)

    @app.exception_handler(HTTPException)
    async def no_such_address(_: Request, error: HTTPException) -> Response:
        words = {
            HTTPStatus.NOT_FOUND: "nothing is at this address; /docs lists all that there are",
            HTTPStatus.METHOD_NOT_ALLOWED: "this address takes another method; /docs says which",
        }
        headers = dict(error.headers) if error.headers else None
        return answer(
            error.status_code, words.get(HTTPStatus(error.status_code), error.detail), headers
        )

    @app.exception_handler(ClientDisconnect)
    async def left(_: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=LEFT)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:
        return answer(
            HTTPStatus.INTERNAL_SERVER_ERROR,
            "the service failed at this request; its log says why",
        )
