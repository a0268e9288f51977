"""`namr serve` as a process of its own, over a real index: what clients and browsers get, whatever
they send, and how it ends."""

from __future__ import annotations

import asyncio
import base64
import http.client
import importlib
import io
import json
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urljoin, urlsplit

import numpy as np
import pytest
import torch
from chromium import chromium, show_at
from conftest import ENVIRONMENT, REPOSITORY, picture
from pictures import jpeg_claiming, saved
from PIL import Image

from namr_dist import Gallery, Hit, load, open_index
from namr_dist.cli.main import main
from namr_dist.errors import InputError
from namr_dist.gallery.embedding import embed_all
from namr_dist.gallery.pictures import collect
from namr_dist.recipes.overrides import configure_quietly
from namr_dist.run.folder import RunFolder
from namr_dist.serve.app import make_app
from namr_dist.serve.guard import Guard
from namr_dist.serve.limits import Limits
from namr_dist.serve.server import Server, bind
from namr_dist.train.checkpoints.network import initial_network, save_network

CLASSES, VIEWS = 6, 4
NASTY = "<b>thing & 100% #1</b>"
OUTSIDE = "../others/3.png"
"""A picture's id is the path that it was given by."""
BODY_SECONDS, WAITING = 3, 24
MIB = 1 << 20


class Service:
    """A running `namr serve`."""

    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.process = process
        self.url = url
        self.log = log
        self.port = urlsplit(url).port

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)

    def ask(
        self, method: str, target: str, body: Any = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Status, body and headers (in lower case) of the answer, on a connection of its own."""
        connection = self.connect()
        try:
            names = {name.replace("_", "-"): value for name, value in headers.items()}
            connection.request(method, target, body, names)
            answer = connection.getresponse()
            named = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, answer.read(), named
        finally:
            connection.close()

    def refused(self, *words: Any, **headers: str) -> tuple[int, str]:
        """Status and reason of an answer that is an error."""
        status, body, _ = self.ask(*words, **headers)
        answer = json.loads(body)
        assert set(answer) == {"detail"} and "Traceback" not in answer["detail"]
        return status, answer["detail"]

    def memory_mib(self, what: str) -> float:
        """VmRSS, or VmHWM, its most so far."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) / 1024  # type: ignore[index]


@contextmanager
def serving(index: Path, folder: Path, *options: object) -> Iterator[Service]:
    folder.mkdir()
    out, log = folder / "out", folder / "log"
    with open(out, "wb") as stdout, open(log, "wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "namr_dist.cli", "serve", index, "--port", "0"]
            + [str(option) for option in options],
            stdout=stdout,
            stderr=stderr,
            env=ENVIRONMENT,
        )
    try:
        while not (found := re.search(r"http://\S+", out.read_text())):
            assert process.poll() is None, log.read_text()
            time.sleep(0.05)
        yield Service(process, found[0], log)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of four views of six things, one of them twice, by a network as it was drawn. One
    picture lies outside of the folder."""
    folder = tmp_path_factory.mktemp("gallery")
    for label in range(CLASSES):
        things = folder / "pictures" / (NASTY if label == 0 else f"thing {label}")
        things.mkdir(parents=True)
        for view in range(VIEWS):
            Image.fromarray(picture(label, view, size=320)).save(things / f"{view}.png")
    Image.fromarray(picture(1, 0, size=320)).save(folder / "pictures" / "thing 1" / "twin.png")
    config = configure_quietly(
        "homeware_conv4", ["--set.model.width", "16", "--set.data.test_size", "32"]
    )
    run = RunFolder(folder / "drawn")
    run.path.mkdir()
    run.config.write_text(config.to_json())
    torch.manual_seed(0)
    network = initial_network(config, device=torch.device("cpu"), pretrained=False, centres=0)
    save_network(run.final, network.state_dict(), config, trained={"steps": 0})
    (folder / "others").mkdir()
    (folder / "pictures" / "thing 5" / "3.png").rename(folder / "others" / "3.png")
    model = load(run.path)
    gallery = model.index(folder / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "pictures")
        outside = collect([Path(OUTSIDE)], model.transform)
    gallery.add(embed_all(model, outside.images), outside.items)
    return gallery.save(folder / "things")


@pytest.fixture(scope="module")
def gallery(index: Path) -> Gallery:
    return open_index(index)


@pytest.fixture(scope="module")
def service(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("service") / "logs"
    options = ("--body-seconds", BODY_SECONDS, "--waiting", WAITING)
    with serving(index, folder, *options) as service:
        yield service
        service.process.terminate()
        assert service.process.wait(60) == 0
        log = service.log.read_text()
        assert "Traceback" not in log and log.replace("\n", "").isprintable()


def query(label: int, view: int = 90) -> bytes:
    """A picture that is not in the gallery."""
    return saved(Image.fromarray(picture(label, view, size=200)), "JPEG", quality=95)


def shown(hits: list[Hit]) -> list[tuple[str, str | None, float]]:
    return [(hit.id, hit.label, hit.distance) for hit in hits]


def neighbours(body: bytes) -> list[tuple[str, str | None, float]]:
    found = json.loads(body)["neighbours"]
    return [(one["id"], one["label"], one["distance"]) for one in found]


@pytest.mark.parametrize("k", [None, 1, 100])
def test_neighbours_are_those_of_the_gallery(
    service: Service, gallery: Gallery, k: int | None
) -> None:
    target = "/search" if k is None else f"/search?k={k}"
    for label in (0, 1):
        status, body, headers = service.ask("POST", target, query(label), Content_Type="image/jpeg")
        assert (status, headers["content-type"]) == (200, "application/json")
        assert neighbours(body) == shown(gallery.search(query(label), k=6 if k is None else k))
    answer = json.loads(body)
    assert (answer["gallery"], answer["mode"], answer["model"]) == ("things", "sample", "drawn")


def test_a_tie_keeps_the_order_of_the_gallery(service: Service, gallery: Gallery) -> None:
    twin = saved(Image.fromarray(picture(1, 0, size=320)), "PNG")
    _, body, _ = service.ask("POST", "/search?k=2", twin, Content_Type="image/png")
    found = neighbours(body)
    assert [one[0] for one in found] == ["thing 1/0.png", "thing 1/twin.png"]
    assert found[0][2] == found[1][2] and found == shown(gallery.search(twin, k=2))


def test_thumbnails_are_of_indexed_pictures_alone(service: Service, gallery: Gallery) -> None:
    _, body, _ = service.ask("POST", "/search?k=100", query(0), Content_Type="image/jpeg")
    found = json.loads(body)["neighbours"]
    assert len(found) == CLASSES * VIEWS + 1 and OUTSIDE in {one["id"] for one in found}
    for one in found:
        # As browsers join addresses: without `..`.
        target = urlsplit(urljoin(f"{service.url}search", one["thumbnail"])).path
        status, jpeg, headers = service.ask("GET", target)
        assert (status, headers["content-type"]) == (200, "image/jpeg"), one
        with Image.open(io.BytesIO(jpeg)) as image:
            assert image.size == (256, 256)
            wanted = gallery.picture(one["id"]).resize((256, 256), Image.Resampling.BOX)
            difference = np.abs(np.asarray(image, float) - np.asarray(wanted, float)).mean()
        assert difference < 12, one["id"]
        assert service.ask("GET", target)[1] == jpeg
        again = service.ask("GET", target, If_None_Match=headers["etag"])
        assert again[:2] == (304, b"") and "max-age" in again[2]["cache-control"]


@pytest.mark.parametrize(
    "id",
    [
        "../drawn/config.json",
        "..%2Fdrawn%2Fconfig.json",
        "/etc/passwd",
        "%2Fetc%2Fpasswd",
        "thing%201/../thing%201/0.png",
        "thing%201/0.png%00",
        "nothing",
        "",
        "%1b[31m",
        "%ff",
    ],
)
def test_no_path_of_a_client_is_opened(service: Service, id: str) -> None:
    status, _ = service.refused("GET", f"/thumbnails/{id}")
    assert status == 404


PNG = saved(Image.fromarray(picture(0, 0)), "PNG")
BAD_BODIES = {
    "empty": (b"", "image/jpeg", 422, "empty"),
    "text": (b"no picture at all", "image/jpeg", 422, "JPEG, PNG"),
    "text as text": (b"no picture at all", "text/plain", 415, "text/plain"),
    "curl's own type": (PNG, "application/x-www-form-urlencoded", 415, "Content-Type: image/jpeg"),
    "path": (b"/etc/passwd", "image/png", 422, "no picture"),
    "truncated": (query(0)[:900], "image/jpeg", 422, "damaged"),
    "damaged PNG": (PNG[:60] + b"\xff" * 40 + PNG[100:], "image/png", 422, "damaged"),
    "SVG": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "image/svg+xml", 422, "no picture"),
    "GIF": (saved(Image.new("L", (8, 8)), "GIF"), "image/gif", 422, "no picture"),
    "a JPEG that claims many pixels": (jpeg_claiming(65000, 65000), "image/jpeg", 413, "pixels"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
def test_bad_bodies_are_refused_in_words(service: Service, name: str) -> None:
    body, kind, status, words = BAD_BODIES[name]
    answered, detail = service.refused("POST", "/search", body, Content_Type=kind)
    assert answered == status and words in detail


def test_a_picture_of_200_megapixels_is_refused_by_its_header(service: Service) -> None:
    png = saved(Image.new("1", (20_000, 10_000)), "PNG")
    before = service.memory_mib("VmHWM")
    status, detail = service.refused("POST", "/search", png, Content_Type="image/png")
    assert (status, "200,000,000 pixels" in detail) == (413, True)
    assert service.memory_mib("VmHWM") - before < 50


@pytest.mark.parametrize("stated", [True, False], ids=["Content-Length", "chunked"])
def test_100_mb_do_not_enter_memory(service: Service, stated: bool) -> None:
    block = bytes(MIB)
    before = service.memory_mib("VmHWM")
    headers = {"Content_Type": "image/jpeg"} | (
        {"Content_Length": str(100 * MIB)} if stated else {}
    )
    status, detail = service.refused("POST", "/search", (block for _ in range(100)), **headers)
    assert status == 413 and "20 MiB" in detail
    # 20 MiB may be read before it is known that there are more.
    assert service.memory_mib("VmHWM") - before < 40
    assert service.ask("POST", "/search", query(0), Content_Type="image/jpeg")[0] == 200


@pytest.mark.parametrize("k", ["0", "101", "-1", "six", "", "1e400", "9" * 5000])
def test_k_has_bounds(service: Service, k: str) -> None:
    status, detail = service.refused("POST", f"/search?k={k}", query(0), Content_Type="image/jpeg")
    assert status == 422 and "from 1 to 100" in detail and len(detail) < 200


def test_other_addresses_and_methods(service: Service) -> None:
    assert service.refused("GET", "/etc/passwd")[0] == 404
    assert service.refused("GET", "/search")[0] == 405
    assert (
        service.refused("POST", "/search", PNG, Content_Type="image/png", Content_Encoding="gzip")[
            0
        ]
        == 415
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "localhost.evil.example", "127.0.0.1.evil:80", "x@localhost"]
)
def test_other_hosts_names_are_refused(service: Service, host: str) -> None:
    status, detail = service.refused(
        "POST", "/search", query(0), Content_Type="image/jpeg", Host=host
    )
    assert status == 400 and "Host" in detail


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "[::1]:8000", "127.0.0.1"])
def test_names_of_this_machine_are_answered(service: Service, host: str) -> None:
    status, body, headers = service.ask("GET", "/healthz", Host=host)
    assert status == 200
    assert json.loads(body)["pictures"] == CLASSES * VIEWS + 1
    assert headers["x-content-type-options"] == "nosniff"
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "access-control-allow-origin" not in headers


def test_the_log_shows_names_of_clients_as_escapes(service: Service) -> None:
    service.ask("GET", "/%1b[2J%0aadded%20line%e2%80%ae")
    _wait(lambda: r"/\x1b[2J\nadded line\u202e" in service.log.read_text())


def test_the_description_needs_no_other_server(service: Service) -> None:
    described = json.loads(service.ask("GET", "/openapi.json")[1])
    search = described["paths"]["/search"]["post"]
    assert list(search["requestBody"]["content"]) == ["image/*"]
    assert {"200", "408", "413", "415", "422", "503"} == search["responses"].keys()
    page = service.ask("GET", "/docs")[1].decode()
    assert all(path in page for path in described["paths"])
    assert not re.search(r"(src|href)=\"?(https?:)?//", page)


def test_20_clients_get_20_answers_each(service: Service, gallery: Gallery) -> None:
    queries = [query(label) for label in range(CLASSES)]
    wanted = [shown(gallery.search(one, k=6)) for one in queries]

    def client(number: int) -> int:
        connection, right = service.connect(), 0
        for turn in range(20):
            label = (number + turn) % CLASSES
            connection.request("POST", "/search", queries[label], {"Content-Type": "image/jpeg"})
            answer = connection.getresponse()
            right += neighbours(answer.read()) == wanted[label] and answer.status == 200
        connection.close()
        return right

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(client, range(20))) == [20] * 20


def _waiting(service: Service) -> int:
    waiting = json.loads(service.ask("GET", "/healthz")[1])["waiting"]
    assert isinstance(waiting, int)
    return waiting


def _wait(enough: Callable[[], Any]) -> None:
    until_s = time.monotonic() + 60
    while not enough():
        assert time.monotonic() < until_s
        time.sleep(0.02)


def _begin(service: Service) -> socket.socket:
    """A search whose picture does not come."""
    client = socket.create_connection(("127.0.0.1", service.port), timeout=60)
    client.sendall(
        b"POST /search HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n"
        b"Content-Length: 1000\r\n\r\n\x89PNG"
    )
    return client


def test_slow_clients_take_places_for_a_while(service: Service) -> None:
    slow = [_begin(service) for _ in range(WAITING)]
    _wait(lambda: _waiting(service) == WAITING)
    status, body, headers = service.ask("POST", "/search", query(0), Content_Type="image/jpeg")
    assert status == 503 and int(headers["retry-after"]) > 0 and b"try again" in body
    for client in slow:
        with client, client.makefile("rb") as file:
            answer = file.read()
        assert answer.startswith(b"HTTP/1.1 408") and b"within 3 s" in answer
    assert service.ask("POST", "/search", query(0), Content_Type="image/jpeg")[0] == 200


def test_a_client_that_leaves_gives_its_place_back(service: Service) -> None:
    _begin(service).close()
    _wait(lambda: "the client left" in service.log.read_text())
    assert _waiting(service) == 0


def test_a_second_signal_ends_it_at_once(index: Path, tmp_path: Path) -> None:
    with serving(index, tmp_path / "logs", "--body-seconds", 600) as service:
        client = _begin(service)
        _wait(lambda: _waiting(service) == 1)
        service.process.send_signal(signal.SIGINT)
        with pytest.raises(subprocess.TimeoutExpired):  # it waits for the picture
            service.process.wait(1.5)
        service.process.send_signal(signal.SIGTERM)
        assert service.process.wait(10) == 128 + signal.SIGTERM
        client.close()


def test_an_error_of_ours_is_in_the_log_alone(
    index: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = open_index(index)
    broken.search(query(0), k=1)
    monkeypatch.setattr(broken.engine, "search", lambda *_: 1 / 0)
    head = {"type": "http", "method": "POST", "path": "/search", "query_string": b""}
    headers = [(b"host", b"localhost"), (b"content-type", b"image/jpeg")]
    sent: list[Any] = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": query(0), "more_body": False}

    async def send(message: Any) -> None:
        sent.append(message)

    guard = Guard(make_app(broken, Limits()), local=True)
    asyncio.run(guard({**head, "headers": headers, "client": ("127.0.0.1", 9)}, receive, send))
    assert [message.get("status") for message in sent] == [500, None]
    assert "log says why" in json.loads(sent[1]["body"])["detail"]
    log = capsys.readouterr().err
    assert "Traceback" in log and "ZeroDivisionError" in log and "/search  500" in log


def test_the_first_address_that_can_be_had_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a name that has an address of another machine (RFC 5737) too."""
    here, elsewhere = (
        socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        for host in ("127.0.0.1", "192.0.2.1")
    )
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [elsewhere, here])
    with bind("two.example", 0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [elsewhere, elsewhere])
    with pytest.raises(
        InputError, match=r"--host two\.example cannot be had \(Cannot assign[^,]*\)"
    ):
        bind("two.example", 0)


def test_what_comes_in_the_last_moment_is_answered(index: Path) -> None:
    """Between the loop's last look at the listening socket and its end."""
    guard = Guard(make_app(open_index(index), Limits()), local=True)

    async def run() -> bytes:
        listener = bind("127.0.0.1", 0)
        server = Server(guard, listener, Limits(), greeting=())
        server.config.load()
        server.lifespan = server.config.lifespan_class(server.config)
        await server.startup([listener])
        asyncio.get_running_loop().remove_reader(listener.fileno())  # it looks no more
        with socket.create_connection(listener.getsockname()) as client:
            client.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
            await server.shutdown([listener])
            return client.makefile("rb").read()

    answer = asyncio.run(run())
    assert answer.startswith(b"HTTP/1.1 200") and b"connection: close" in answer


def test_an_address_that_cannot_be_had(
    service: Service, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, words in (
        (["--port", str(service.port)], f"--port {service.port} of --host 127.0.0.1"),
        (["--host", "203.0.113.9"], "--host 203.0.113.9"),  # of RFC 5737: nobody's
        (["--host", "no such host"], "--host no such host"),
        (["--port", "70000"], "--port is 70000"),
        (["--waiting", "0"], "waiting is 0"),
    ):
        assert main(["serve", "nothing", *options]) == 2
        assert words in capsys.readouterr().err


def test_an_index_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "nothing"), "--port", "0"]) == 2
    assert "nothing" in capsys.readouterr().err


def test_packages_that_are_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)  # type: ignore[arg-type]
    assert main(["serve", "nothing"]) == 2
    assert "pip install 'namr-dist[serve]'" in capsys.readouterr().err


def test_the_page_shows_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(REPOSITORY / "tools")
    make_serve_bench = importlib.import_module("make_serve_bench")
    record = json.loads(make_serve_bench.RESULTS.read_text())
    assert make_serve_bench.table(record) in make_serve_bench.PAGE.read_text()


DROP = """
const bytes = Uint8Array.from(atob(arguments[0]), c => c.charCodeAt(0));
const transfer = new DataTransfer();
transfer.items.add(new File([bytes], 'photo', {type: arguments[1]}));
document.querySelector('main').dispatchEvent(
  new DragEvent('drop', {bubbles: true, cancelable: true, dataTransfer: transfer}));
"""
SHOWN = """return [...document.querySelectorAll('#neighbours li')].map(entry => [
  entry.querySelector('img').naturalWidth, entry.querySelector('img').alt, entry.innerText])"""


@pytest.mark.browser
def test_a_picture_is_dropped_on_the_page(
    service: Service, gallery: Gallery, tmp_path: Path
) -> None:
    wanted = gallery.search(query(0), k=6)
    with chromium(tmp_path / "chromium") as chrome:
        for width, scheme in ((1280, "light"), (390, "dark")):
            show_at(chrome, width=width, scheme=scheme)
            chrome.get(service.url)
            dropped = base64.b64encode(query(0)).decode()
            chrome.execute_script(DROP, dropped, "image/jpeg")
            _wait(lambda: sum(one[0] > 0 for one in chrome.execute_script(SHOWN)) == 6)
            found = chrome.execute_script(SHOWN)
            for (pixels, alt, words), hit in zip(found, wanted, strict=True):
                assert (pixels, alt) == (256, hit.label)
                assert hit.id in words and f"{hit.distance:.4f}" in words
            assert NASTY in [alt for _, alt, _ in found], "no name that is not text"
            assert chrome.get_log("browser") == []
            assert chrome.execute_script("return document.documentElement.scrollWidth") <= width
            others = chrome.execute_script(
                "return performance.getEntriesByType('resource').map(one => one.name)"
            )
            assert all(one.startswith((service.url, "blob:", "data:")) for one in others)
            chrome.execute_script(DROP, base64.b64encode(b"no picture").decode(), "text/plain")
            _wait(lambda: not chrome.execute_script(SHOWN))
            alert = chrome.find_element("css selector", "[role=alert]")
            assert "no picture" in alert.text
            chrome.get_log("browser")  # has the answer 422
        chrome.find_element("css selector", "body").send_keys("\t")
        assert chrome.execute_script("return document.activeElement.id") == "file"


class Client:
    """Searches again and again until the service takes no more connections."""

    def __init__(self, service: Service, gallery: Gallery, *, keeps: bool) -> None:
        self.right, self.lost, self.last_s = 0, [], 0.0
        wanted = shown(gallery.search(query(2), k=6))
        self._run = lambda: self._until_refused(service, wanted, keeps=keeps)

    def __call__(self) -> Client:
        self._run()
        return self

    def _until_refused(self, service: Service, wanted: list, *, keeps: bool) -> None:
        connection = None
        while True:
            if connection is None:
                connection = service.connect()
                try:
                    connection.connect()
                except OSError:
                    return
            try:
                connection.request("POST", "/search", query(2), {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                body = answer.read()
            except (OSError, http.client.HTTPException) as error:
                self.lost.append(repr(error))
                return
            assert (answer.status, neighbours(body)) == (200, wanted)
            self.right, self.last_s = self.right + 1, time.monotonic()
            if not keeps or answer.will_close:
                connection.close()
                connection = None


def test_a_signal_under_load_loses_no_accepted_request(service: Service, gallery: Gallery) -> None:
    """The last one: it ends the service of this file."""
    clients = [Client(service, gallery, keeps=number % 2 == 0) for number in range(20)]
    with ThreadPoolExecutor(20) as pool:
        running = [pool.submit(client) for client in clients]
        _wait(lambda: sum(client.right for client in clients) >= 40)
        # While it stands still, requests gather that the kernel alone has accepted.
        service.process.send_signal(signal.SIGSTOP)
        time.sleep(0.3)
        sent_s = time.monotonic()
        service.process.send_signal(signal.SIGTERM)
        service.process.send_signal(signal.SIGCONT)
        done = [future.result(60) for future in running]
    assert [client.lost for client in done] == [[]] * 20
    assert sum(client.last_s > sent_s for client in done) > 1, "none waited when it came"
    assert service.process.wait(30) == 0
