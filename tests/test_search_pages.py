"""The page that searches while it is open, and the page of hits: what they show and refuse, in a real browser."""

from __future__ import annotations

import base64
import http.client
import io
import json
import re
import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from browsertools import Browser, browser, needs_browser
from PIL import Image

from vlm.errors import ConfigError
from vlm.report.hits import Hit, Hits, split
from vlm.report.pictures import THUMBNAIL, small
from vlm.report.sections import write_report
from vlm.serve import local
from vlm.serve.local import LocalServer, Request, Response
from vlm.serve.search import MOST, SearchPages
from vlm.siglip.search.asking import Searcher

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
ODD = "<script>alert(1)</script> \"quoted\" 'é 星'.png"
NAMES = ["red", "green", "blue", ODD]


def as_vectors(rows: Sequence[Sequence[float]]) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float32), dim=1)


def by_text(texts: Sequence[str]) -> tuple[torch.Tensor, tuple[int, ...]]:
    """A text is as near to a colour as it names it."""
    rows = [[float(text.count(name)) + 0.1 for name in COLOURS] for text in texts]
    return as_vectors(rows), tuple(number for number, text in enumerate(texts) if len(text) > 64)


def by_image(images: Sequence[Any]) -> torch.Tensor:
    from vlm.images.load import load_image

    return as_vectors([[value + 1.0 for value in load_image(image).getpixel((0, 0))] for image in images])  # type: ignore


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> SearchPages:
    """Three pictures of one colour each, and one of no clear colour whose file has gone bad and whose id is odd."""
    folder = tmp_path_factory.mktemp("pictures")
    files = [folder / f"{name}.png" for name in COLOURS] + [folder / "broken.png"]
    for path, colour in zip(files, COLOURS.values(), strict=False):
        Image.new("RGB", (40, 30), colour).save(path)
    files[-1].write_bytes(b"no picture")
    vectors = as_vectors([[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 1]])

    def top(queries: torch.Tensor, k: int, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        scores = queries @ vectors.T
        return (scores if allowed is None else scores.masked_fill(~allowed, -9)).topk(k)

    info = [{"kind": "warm"}, {"kind": "cold"}, {"kind": "cold"}, {}]
    searcher = Searcher(["a/red", "a/green", "a/blue", ODD], info, lambda row: vectors[row], top, by_text, by_image)
    return SearchPages(
        searcher,
        lambda row: files[row],
        lambda row: "",
        title="Four pictures",
        about="of a test",
        filters={"kind": ["cold", "warm"]},
    )


@pytest.fixture(scope="module")
def address(pages: SearchPages) -> Iterator[str]:
    with served(pages) as server:
        yield server.address


class served:
    """A server in a thread, for a block."""

    def __init__(self, answer: local.Answer) -> None:
        self.server = LocalServer(answer)
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> LocalServer:
        self.thread.start()
        return self.server

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


def asked(address: str, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes, Any]:
    """Status, body and headers of an answer."""
    connection = http.client.HTTPConnection(address.split("/")[2], timeout=20)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request("GET" if body is None else "POST", path, body=body, headers=named)
    answer = connection.getresponse()
    found = answer.status, answer.read(), answer.headers
    connection.close()
    return found


def found(address: str, path: str, body: bytes | None = None) -> Any:
    status, said, _ = asked(address, path, body)
    assert status == 200, said
    return json.loads(said)


def as_png(colour: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


# --- what is found ----------------------------------------------------------------------------------------------------


def test_words_pictures_and_examples_are_answered(address: str) -> None:
    said = found(address, "/api/search?q=red&k=2")
    assert said["query"] == "red" and said["total"] == 4
    assert [(one["id"], one["rank"]) for one in said["results"]] == [("a/red", 1), (ODD, 2)]
    expected = torch.nn.functional.normalize(torch.tensor([1.1, 0.1, 0.1]), dim=0)
    assert said["results"][0]["score"] == pytest.approx(float(expected[0]), abs=1e-6)
    assert "2 of 4 · cosine similarity" in said["note"] and said["more"]

    by_picture = found(address, "/api/search?k=1", as_png((0, 0, 255)))
    assert by_picture["results"][0]["id"] == "a/blue" and by_picture["query"] == "the picture"

    like = found(address, "/api/search?like=a/green&k=4")
    assert like["results"][0]["id"] == "a/green" and like["results"][0]["score"] == pytest.approx(1)
    assert len(like["results"]) == 4 and not like["more"]


def test_words_and_a_picture_are_fused_by_rank(address: str) -> None:
    said = found(address, "/api/search?q=red+red+red+green", as_png((0, 255, 10)))
    # Of the words: red, odd, green, blue; of the picture: green, odd, blue, red.
    sums = {"a/red": (1, 4), ODD: (2, 2), "a/green": (3, 1), "a/blue": (4, 3)}
    assert {one["id"]: one["score"] for one in said["results"]} == {
        id: pytest.approx(sum(1 / (60 + rank) for rank in ranks)) for id, ranks in sums.items()
    }
    assert [one["id"] for one in said["results"]] == ["a/green", ODD, "a/red", "a/blue"]
    assert "reciprocal rank fusion" in said["note"] and "60" in said["note"]


def test_filters_leave_fewer_and_a_value_that_nothing_has_leaves_none(address: str) -> None:
    said = found(address, "/api/search?q=red&where=kind%3Dcold")
    assert {one["id"] for one in said["results"]} == {"a/green", "a/blue"} and "filter leaves 2" in said["note"]
    assert found(address, "/api/search?q=red&where=kind%3Dnone")["results"] == []
    assert [one["id"] for one in found(address, "/api/search?where=kind%3Dwarm")["results"]] == ["a/red"]


def test_nothing_asked_shows_the_collection_and_long_texts_are_told(address: str) -> None:
    said = found(address, "/api/search?q=%20&k=3")
    assert [one["id"] for one in said["results"]] == ["a/red", "a/green", "a/blue"] and said["more"]
    assert [one["score"] for one in said["results"]] == [None] * 3
    assert "longer than the model reads" in found(address, "/api/search?q=" + "red+" * 40)["note"]


def test_pictures_come_small_and_only_those_of_the_collection(address: str, pages: SearchPages) -> None:
    results = found(address, "/api/search?q=red")["results"]
    status, data, headers = asked(address, results[0]["picture"])
    assert status == 200 and headers["Content-Type"] == "image/png"
    assert Image.open(io.BytesIO(data)).getpixel((5, 5)) == (255, 0, 0)
    status, said, _ = asked(address, next(one["picture"] for one in results if one["id"] == ODD))
    assert status == 404 and "broken.png" in json.loads(said)["error"]
    state = results[0]["picture"].rsplit("/", 1)[0]
    wrong = ["4", "-1", "../../etc/passwd", "%2e%2e/%2e%2e/etc/passwd", "0/../0", "%D9%A3", "1e0", "", "/etc/passwd"]
    for address_of in [*(f"{state}/{row}" for row in wrong), "/picture/other/0", "/etc/passwd", "/../etc/passwd"]:
        status, said, _ = asked(address, address_of)
        assert status == 404 and "error" in json.loads(said), address_of


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("/api/search?q=red&k=0", "from 1 to"),
        (f"/api/search?q=red&k={MOST + 1}", "from 1 to"),
        ("/api/search?q=red&k=ten", "'ten'"),
        ("/api/search?q=red&k=1&k=2", "one whole number"),
        ("/api/search?query=red", "unknown field 'query'"),
        ("/api/search?like=nobody", "'nobody'"),
        ("/api/search?q=red&where=kind", "key=value"),
        ("/api/search?q=red&where=kinds%3Dcold", "did you mean 'kind'"),
        ("/api/search?q=" + "x" * 3000, "characters"),
        ("/api/search?" + "q=a&" * 9, "9 parts"),
        ("/api/search?" + "q=a&" * 200, "cannot be read"),
        ("/api/search?q=%FF", "cannot be read"),
    ],
)
def test_a_bad_request_is_a_sentence(address: str, path: str, says: str) -> None:
    status, said, _ = asked(address, path)
    assert status == 400 and says in json.loads(said)["error"]


def test_what_is_sent_is_bounded_and_must_be_a_picture(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    status, said, _ = asked(address, "/api/search", b"no picture")
    assert status == 400 and "known image format" in json.loads(said)["error"] or "image" in json.loads(said)["error"]
    monkeypatch.setattr(local, "MAX_BODY", 10)
    status, said, _ = asked(address, "/api/search", b"x" * 11)
    assert status == 413 and "at most 10" in json.loads(said)["error"]
    host = address.split("/")[2]
    for headers in ("", "Transfer-Encoding: chunked\r\n", "Content-Length: -5\r\n", "Content-Length: x\r\n"):
        assert raw(host, f"POST /api/search HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n").startswith("HTTP/1.1 411")


def raw(host: str, text: str) -> str:
    """The answer to these very bytes."""
    name, port = host.split(":")
    with socket.create_connection((name, int(port)), timeout=20) as connection:
        connection.sendall(text.encode("latin-1"))
        return connection.recv(65536).decode("latin-1")


@pytest.mark.parametrize("host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil:1", ""])
def test_a_name_that_was_led_here_is_refused(address: str, host: str) -> None:
    """DNS rebinding: a page of elsewhere whose name now means this machine."""
    for path in ("/", "/api/search?q=red"):
        status, said, _ = asked(address, path, Host=host)
        assert status == 403 and "127.0.0.1 alone" in json.loads(said)["error"]


def test_a_page_of_elsewhere_may_not_ask(address: str) -> None:
    own = address.rstrip("/")
    assert asked(address, "/api/search?q=red", Origin=own)[0] == 200
    for origin in ("http://evil.example", "null", own.replace("http:", "https:"), f"{own}0"):
        assert asked(address, "/api/search?q=red", Origin=origin)[0] == 403
    # A tunnel ends at another port; its name is this machine's.
    assert asked(address, "/", Host="localhost:9999")[0] == 200
    headers = asked(address, "/")[2]
    assert headers["Cross-Origin-Resource-Policy"] == "same-origin" and "Access-Control-Allow-Origin" not in headers
    assert "frame-ancestors 'none'" in headers["Content-Security-Policy"]


def test_only_this_machine_is_answered(pages: SearchPages) -> None:
    server = LocalServer(pages)
    try:
        assert server.socket.getsockname()[0] == "127.0.0.1"
        port = server.server_address[1]
        with pytest.raises(ConfigError, match=f"port {port} cannot be used.*0 for any free"):
            LocalServer(pages, int(port))
    finally:
        server.server_close()
    with pytest.raises(ConfigError, match="65535"):
        LocalServer(pages, 70000)


def test_many_ask_at_once_and_one_leaves(address: str) -> None:
    host = address.split("/")[2]
    socket.create_connection(tuple(host.split(":")), timeout=5).close()  # type: ignore[arg-type]
    words = [name for name in COLOURS for _ in range(8)]
    with ThreadPoolExecutor(12) as threads:
        said = list(threads.map(lambda word: found(address, f"/api/search?q={word}&k=1"), words))
    assert [one["results"][0]["id"] for one in said] == [f"a/{word}" for word in words]


def test_a_fault_in_an_answer_does_not_end_the_server(capfd: pytest.CaptureFixture[str]) -> None:
    def answer(request: Request) -> Response:
        if request.path == "/fault":
            raise RuntimeError("a bug")
        return local.in_json(1)

    with served(answer) as server:
        with pytest.raises(http.client.HTTPException):
            asked(server.address, "/fault")
        assert asked(server.address, "/")[0] == 200
    assert "RuntimeError: a bug" in capfd.readouterr().err


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


@needs_browser
def test_somebody_types_and_sees_what_is_found(address: str, page: Browser) -> None:
    ids = "[...document.querySelectorAll('.hit')].map(one => one.dataset.id).join('|')"
    page.open(address)
    page.wait("document.querySelectorAll('.hit').length === 4")
    page.wait("document.activeElement.id === 'q'")
    page.type("blue")
    page.wait(f"{ids}.startsWith('a/blue|')")
    status = page.value("document.getElementById('status').textContent")
    assert "4 of 4" in status and " ms" in status and page.value("location.search") == "?q=blue"
    # An id is shown as it is, and never as HTML.
    assert ODD in page.value(ids).split("|") and page.value("document.querySelectorAll('.hit script').length") == 0
    shown = "[...document.querySelectorAll('.hit img')].filter(one => one.naturalWidth === 40).length"
    page.wait(f"{shown} === 3")
    page.wait("document.body.innerText.includes('picture not readable')")
    assert page.value("document.querySelector('.hit img').alt") == "a/blue"

    page.value("document.querySelector('[aria-label=kind]').value = 'kind=warm'")
    page.value("document.querySelector('[aria-label=kind]').dispatchEvent(new Event('change'))")
    page.wait(f"{ids} === 'a/red'")
    page.value("history.back()")
    page.wait(f"{ids}.startsWith('a/blue|')")
    page.value("document.querySelectorAll('.hit .like')[3].click()")
    page.wait("document.body.innerText.includes('like a/')")
    page.value("document.querySelector('.hit .picture button').click()")
    page.wait("document.querySelector('dialog').open && document.querySelector('dialog img').naturalWidth === 40")
    # The picture that could not be read is the one thing that was not there; no script was stopped by the policy.
    assert [one for one in page.complaints() if "404" not in one] == []


@needs_browser
def test_an_address_with_a_query_shows_its_hits_and_a_dropped_picture_searches(address: str, page: Browser) -> None:
    first = "document.querySelector('.hit')?.dataset.id"
    page.open(f"{address}?q=green")
    page.wait(f"{first} === 'a/green'")
    data = base64.b64encode(as_png((0, 0, 255))).decode()
    page.value(f"""(() => {{
        const data = Uint8Array.from(atob('{data}'), c => c.charCodeAt(0));
        const drop = new Event('drop', {{cancelable: true}});
        drop.dataTransfer = {{files: [new File([data], 'b.png', {{type: 'image/png'}})]}};
        document.getElementById('q').value = '';
        dispatchEvent(drop);
    }})()""")
    page.wait(f"{first} === 'a/blue'")
    assert page.value("document.querySelector('.chip').innerText").startswith("b.png")
    page.value("document.getElementById('q').value = 'green'")
    page.value("document.getElementById('ask').requestSubmit()")
    page.wait("document.getElementById('status').textContent.includes('reciprocal rank fusion')")
    page.open(f"{address}?q=red&where=nothing%3D1")
    page.wait(f"{first} === 'a/red'")
    assert page.complaints() == [] or all("404" in one for one in page.complaints())


# --- the page of hits -------------------------------------------------------------------------------------------------


def test_a_page_of_hits_holds_everything_and_escapes_it(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.effect_noise((1600, 900), 90).convert("RGB").save(photo)
    hits = [Hit(ODD, 0.5, 1, photo), Hit("b", 0.25, 2, tmp_path / "gone.png"), Hit("c", 0.125, 3, None, "<i>words</i>")]
    page = write_report(
        tmp_path / "g.html", title=ODD, sections=[Hits(ODD, hits, 1234, "so", image=photo), Hits("none", [], 1234)]
    ).read_text()
    assert "<script>alert" not in page and page.count("<script>") == 1 and "<i>words" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page and "<b>3</b> of 1,234 · so" in page
    assert "picture not readable: missing" in page and "nothing was found" in page and "0.1250" in page
    assert not re.search(r"""(src|href)=["'](?!data:)""", page) and "default-src 'none'" in page
    alts = re.findall(r'<img alt="([^"]*)"', page)
    assert len(alts) == 2 and all(alts)


def test_thumbnails_are_bounded(tmp_path: Path) -> None:
    photo = Image.effect_noise((3000, 2000), 90).convert("RGB")  # noise: no picture takes more bytes
    made = small(photo)
    assert Image.open(io.BytesIO(made.data)).size == (THUMBNAIL, round(THUMBNAIL * 2 / 3)) and len(made.data) < 60_000
    assert photo.size == (3000, 2000)


@pytest.mark.parametrize(
    ("id", "parts"), [("a/b/c.png", ("a/b", "c.png")), ("c", ("", "c")), ("a/", ("", "a/")), ("/c", ("", "c"))]
)
def test_an_id_is_shown_as_folder_and_name(id: str, parts: tuple[str, str]) -> None:
    assert split(id) == parts
