"""The report page: self-contained, safe with hostile text, and right about what it shows."""

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from vlm.eval import (
    Curve,
    Curves,
    Dot,
    Figure,
    Gallery,
    GalleryItem,
    Scatter,
    Score,
    Scores,
    Stat,
    Table,
    Text,
    breakdown,
    write_report,
)
from vlm.eval.metrics import registry
from vlm.report.charts import draw, draw_scatter
from vlm.report.page import text

HOSTILE = "<script>alert(1)</script>\"onload='x' &amp; \ud800 \x00 \x9b"


class Tags(HTMLParser):
    """Collects every tag with its attributes, and checks that tags close in order."""

    VOID = {"meta", "img", "line", "polyline", "circle", "path", "br", "wbr"}

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(html)
        assert self.open == [], f"unclosed: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def full_page(path: Path) -> str:
    picture = Image.new("RGB", (9, 7), (200, 30, 30))
    write_report(
        path,
        title=HOSTILE,
        subtitle=HOSTILE,
        stats=[Stat(HOSTILE, HOSTILE, HOSTILE, "good")],
        summary=[Score(HOSTILE, 0.5, (0.4, 0.6), 10, HOSTILE), Score("text", HOSTILE)],
        curves=[
            Curve(HOSTILE, {HOSTILE: [(0, 1), (1, 2)]}, HOSTILE, HOSTILE, marks=[(0.5, HOSTILE)]),
            Scatter(HOSTILE, [Dot(HOSTILE, 1, 2, 0, 3, [1, 3])], HOSTILE, HOSTILE),
            picture,
        ],
        gallery=[
            GalleryItem(picture, HOSTILE, HOSTILE, [HOSTILE], True, 1.0, HOSTILE, HOSTILE, HOSTILE),
            GalleryItem(None, "p", "", [], False, kind="other"),
        ],
        sections=[Table(HOSTILE, [HOSTILE], [[HOSTILE]], HOSTILE), Text(HOSTILE, [HOSTILE])],
        footer=[HOSTILE],
    )
    return path.read_text(encoding="utf-8")


def test_hostile_text_stays_text(tmp_path: Path) -> None:
    html = full_page(tmp_path / "r.html")
    parsed = Tags(html)
    assert sum(tag == "script" for tag, _ in parsed.tags) == 1  # ours
    assert not [attrs for _, attrs in parsed.tags if any(name.startswith("on") for name in attrs)]
    assert "\x00" not in html and "\x9b" not in html
    assert html.count("&lt;script&gt;") >= 15


def test_page_loads_nothing_from_anywhere(tmp_path: Path) -> None:
    html = full_page(tmp_path / "r.html")
    for tag, attrs in Tags(html).tags:
        assert tag not in ("link", "iframe", "object", "embed", "base")
        for name in ("src", "href", "srcset", "action", "data"):
            assert (attrs.get(name) or "data:").startswith("data:"), (tag, attrs)
    assert "url(" not in html and "@import" not in html and "http:" not in html and "https:" not in html
    assert "default-src 'none'" in html


def embedded(html: str) -> list[Image.Image]:
    found = re.findall(r'src="data:image/(?:png|jpeg);base64,([^"]+)"', html)
    return [Image.open(io.BytesIO(base64.b64decode(data))) for data in found]


def test_small_pictures_are_embedded_bit_for_bit_and_large_ones_scaled(tmp_path: Path) -> None:
    tiny = Image.effect_noise((40, 30), 90).convert("RGB")
    large = Image.new("RGB", (2000, 1000), (10, 200, 30))
    path = tmp_path / "tiny.png"
    tiny.save(path)
    html = Gallery([GalleryItem(path, "", "", []), GalleryItem(large, "", "", [])]).html()
    first, second = embedded(html)
    assert first.tobytes() == tiny.tobytes() and second.size == (480, 240)
    assert large.size == (2000, 1000)  # the caller's picture is left alone
    assert html.count('class="tiny"') == 1


def test_a_broken_gallery_picture_is_a_note(tmp_path: Path) -> None:
    html = Gallery([GalleryItem(tmp_path / "nowhere.png", "p", "said", ["gold"], correct=False)]).html()
    assert "image not readable: missing" in html and "said" in html and "<img" not in html


def test_gallery_filters_count_right_and_wrong_and_list_kinds() -> None:
    cards = [GalleryItem(None, "", "x", [], correct=i < 3, kind="even" if i % 2 == 0 else "odd") for i in range(5)]
    html = Gallery(cards).html()
    assert "all 5" in html and "right 3" in html and "wrong 2" in html
    assert html.count('data-mark="right"') == 3 and html.count('data-mark="wrong"') == 2
    assert '<option value="even">' in html and html.count('data-kind="odd"') == 2
    plain = Gallery([GalleryItem(None, "", "x", [], score=0.25)]).html()
    assert "data-show" not in plain and "<select" not in plain and "0.25" in plain


def test_score_bars_have_the_length_of_the_value() -> None:
    html = Scores([Score("cider", 2.5, (2.0, 4.0), 7, maximum=10.0), Score("none", 3.0, maximum=None)]).html()
    assert 'style="width:25.00%"' in html and 'style="left:20.00%;right:60.00%"' in html
    assert html.count('class="bar"') == 1 and "2.000 – 4.000" in html
    assert "95.1 %" in Scores([Score("a", 0.951, percent=True)]).html()


def test_breakdown_means_per_kind_and_rest_together() -> None:
    scores = {"a": 1.0, "b": 0.0, "c": 1.0, "d": 0.5}
    table = breakdown(scores, {"a": "x", "b": "x", "c": "y", "d": "z"}, metric="m", limit=2)
    assert [(row.name, row.value, row.num_items) for row in table.rows] == [("x", 0.5, 2), ("other (2 kinds)", 0.75, 2)]


def test_a_page_is_replaced_in_one_step(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.html"
    write_report(path, title="first")
    write_report(path, title="second")
    assert "second" in path.read_text() and list(path.parent.iterdir()) == [path]


def points_of(html: str) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline points="([^"]+)"', html)
    return [[(float(a), float(b)) for a, b in (pair.split(",") for pair in line.split())] for line in lines]


def test_line_goes_where_the_data_goes() -> None:
    """Equal steps of data are equal steps of pixels; y grows upwards; log scale makes powers of ten equal steps."""
    (line,) = points_of(draw(Curve("", {"a": [(0, 0), (1, 1), (2, 2)]})))
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1
    (line,) = points_of(draw(Curve("", {"a": [(0, 0.01), (1, 0.1), (2, 1.0)]}, log_y=True)))
    assert line[0][1] - line[1][1] == pytest.approx(line[1][1] - line[2][1], abs=0.2)


def test_long_lines_are_thinned_and_odd_points_left_out() -> None:
    (line,) = points_of(draw(Curve("", {"a": [(float(i), float(i % 7)) for i in range(5000)]})))
    assert 200 < len(line) <= 400
    (line,) = points_of(draw(Curve("", {"a": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]})))
    assert len(line) == 2
    assert "no points" in draw(Curve("", {"a": [(0, -1)]}, log_y=True))


@pytest.mark.parametrize("points", [[(5, 5)], [(0, 0), (1, 0)], [(0, 1e-9), (1, 3e-9)], [(0, 1e6), (1, 9e9)]])
@pytest.mark.parametrize("log_y", [False, True])
def test_charts_stay_inside_their_frame(points: list[tuple[float, float]], log_y: bool) -> None:
    for line in points_of(draw(Curve("", {"a": points}, log_y=log_y))):
        assert all(0 <= x <= 560 and 0 <= y <= 290 for x, y in line)


def test_scatter_points_lie_where_their_values_are_and_whiskers_stop_at_the_frame() -> None:
    dots = [Dot("a", 0, 1, 0.5, 1.5), Dot("b", 10, 2, -100, 100, each=[1.5, 2.5]), Dot("c", 10, 2)]
    html = draw_scatter(Scatter("", dots))
    big = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="5.5"', html)[:3]]
    small = [float(y) for y in re.findall(r'cy="([\d.]+)" r="2"', html)]
    assert big[0][0] < big[1][0] < big[2][0] and big[2][0] - big[1][0] >= 11  # b and c are set apart
    assert big[0][1] > big[1][1] == big[2][1]
    assert sum(small) / 2 == pytest.approx(big[1][1], abs=0.2)
    within, cut = re.findall(r'd="M[\d.]+,([\d.]+)V([\d.]+)([^"]*)"', html)[:2]
    assert (float(within[0]) + float(within[1])) / 2 == pytest.approx(big[0][1], abs=0.2) and within[2].count("h8") == 2
    assert 0 < float(cut[0]) < float(cut[1]) < 290 and "h8" not in cut[2]


def test_several_answers_have_their_own_marks(tmp_path: Path) -> None:
    answers = [("one", "a cat", True), ("two", "", False), ("three", HOSTILE, None)]
    items = [GalleryItem(None, "what?", "", ["a cat"], answers=answers)]
    html = write_report(tmp_path / "r.html", title="t", gallery=items).read_text()
    assert html.count("✓") == html.count("✗") == 1 and html.count("(empty)") == 1
    assert html.index("one") < html.index("two") < html.index("three")
    assert text(HOSTILE) in html and HOSTILE not in html
    Tags(html)


def test_figures_keep_their_size(tmp_path: Path) -> None:
    html = Curves([Figure(Image.new("RGB", (900, 300)), caption="loss")]).html()
    assert embedded(html)[0].size == (900, 300) and "loss" in html


def test_examples_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every Python block but those that need a trained model or Java."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_METRICS", dict(registry._METRICS))
    document = Path(__file__).parent.parent / "docs" / "evaluation.md"
    blocks = re.findall(r"```python\n(.*?)```", document.read_text(encoding="utf-8"), re.DOTALL)
    trained = ("runs/x/model", "needs the extra", 'siglip.load("M")')
    needy = [block for block in blocks if any(words in block for words in trained)]
    assert (len(blocks), len(needy)) == (7, 3)
    for block in blocks:
        if block in needy:
            continue
        exec(compile(block, str(document), "exec"), {})
    assert registry.compute("mean_words", {"1": "a b", "2": "a"}, {"1": ("x",), "2": ("x",)}).value == 1.5
    assert "exact_<wbr>match" in (tmp_path / "report.html").read_text()


def test_documentation_lists_every_metric() -> None:
    document = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = [name for name in registry.names() if f"`{name}`" not in document]
    assert rows == ["bleu_2", "bleu_3"]  # inside `bleu_1` ... `bleu_4`


def test_text_keeps_every_printable_character() -> None:
    assert text("é 日本 \U0001f600\n\t") == "é 日本 \U0001f600\n\t"
