"""The report's page in a real headless Chromium: it fetches nothing, complains of nothing, and does what it says."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from samray.output.shards import read_shard
from samray.report.output import write_report
from tests.support.report_outputs import HEIGHT, NAMES, WIDTH, named_masks, nested_masks, write_output

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

PART, WHOLE, APART = (10, 10), (35, 25), (70, 50)
"""Pixels (x, y) of `nested_masks`: the part is on top of the whole."""

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("no Chromium here, so NOTHING of the report's page is tested: apt-get install chromium")
    sync_api = pytest.importorskip(
        "playwright.sync_api", reason="NOTHING of the report's page is tested: pip install 'samray[test]'"
    )
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # as root Chromium has none to offer
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, tmp_path: Path) -> Iterator[Open]:
    """Opens the report of an output, and holds afterwards that it fetched nothing and complained of nothing."""
    complaints: list[str] = []
    requests: list[str] = []

    def watch(page: Page, url: str) -> None:
        page.on("console", lambda message: complaints.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.on("dialog", lambda dialog: (complaints.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url)

    def open_it(output: str, **options: Any) -> Page:
        page_url = Path(write_report(output, str(tmp_path / "page.html"))).as_uri()
        page = browser.new_page(**{"viewport": {"width": 1200, "height": 900}, **options})
        watch(page, page_url)
        assert {url for url in requests if not url.startswith("data:")} == {page_url}
        return page

    yield open_it
    assert complaints == []
    for context in browser.contexts:
        context.close()


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_output(str(tmp_path_factory.mktemp("report"))).output


@pytest.fixture
def page(open_page: Open, output: str) -> Page:
    return open_page(output)


def at(frame: Locator, pixel: tuple[int, int]) -> tuple[float, float]:
    """Where a pixel of the image is in the window."""
    box = frame.bounding_box()
    assert box is not None
    return box["x"] + (pixel[0] + 0.5) / WIDTH * box["width"], box["y"] + (pixel[1] + 0.5) / HEIGHT * box["height"]


def canvas(page: Page, kind: str, index: int = 0) -> str:
    """What a canvas shows, after the page has painted."""
    page.locator(".gallery[aria-busy=false]").wait_for()
    return str(page.locator(f"canvas.{kind}").nth(index).evaluate("(canvas) => canvas.toDataURL()"))


def alpha_at(page: Page, kind: str, pixel: tuple[int, int], index: int = 0) -> int:
    """Opacity there, 0 to 255, on a copy of the canvas: reading the canvas itself is slow and logs a warning."""
    code = """([index, kind, x, y]) => {
        const copy = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
        copy.drawImage(document.querySelectorAll(`canvas.${kind}`)[index], -x, -y);
        return copy.getImageData(0, 0, 1, 1).data[3];
    }"""
    canvas(page, kind, index)
    return int(page.evaluate(code, [index, kind, *pixel]))


def slide(page: Page, name: str, value: float) -> None:
    page.locator(f"#{name}").fill(str(value))


def shown(page: Page) -> str:
    return " ".join(page.locator(".shown [aria-live]").inner_text().split())


def tip(page: Page) -> str:
    return " ".join(page.locator("#tip").inner_text().split()) if page.locator("#tip").is_visible() else ""


def test_masks_are_painted_where_they_lie(page: Page) -> None:
    assert page.locator(".tile").count() == 6
    assert shown(page) == "18 of 18 masks shown"
    for pixel in (PART, WHOLE, APART):
        assert alpha_at(page, "masks", pixel) > 0
    assert alpha_at(page, "masks", (70, 10)) == 0


def test_hover_shows_the_figures_of_the_mask_under_the_pointer(page: Page, output: str) -> None:
    rows = read_shard(output, 1).to_pylist()
    frame = page.locator(".frame").nth(2)  # the first image of the second shard
    masks = rows[0]["annotations"]
    for pixel, mask in ((PART, masks[0]), (WHOLE, masks[1]), (APART, masks[2])):
        page.mouse.move(*at(frame, pixel))
        page.locator("#tip", has_text=f"{mask['id']}").wait_for()  # a busy machine takes a while to show it
        text = tip(page)
        assert f"predicted IoU {mask['predicted_iou']:.3f}" in text
        assert f"stability {mask['stability_score']:.3f}" in text
        assert f"area {mask['area']:,} px" in text
        x, y = mask["point_coords"][0]
        assert f"click point {x:g}, {y:g}" in text
        assert f"id {mask['id']}" in text
        assert alpha_at(page, "focus", pixel, 2) > 0
        assert alpha_at(page, "focus", (70, 10), 2) == 0
    page.mouse.move(*at(frame, (70, 10)))
    page.locator("#tip").wait_for(state="hidden")
    assert alpha_at(page, "focus", APART, 2) == 0


def test_click_isolates_a_mask_until_a_click_elsewhere_or_escape(page: Page) -> None:
    frame = page.locator(".frame").first

    def is_isolating() -> bool:
        page.mouse.move(1, 1)
        dark_outside, clear_inside = alpha_at(page, "focus", (70, 10)) > 100, alpha_at(page, "focus", WHOLE) == 0
        assert dark_outside == ("isolating" in (frame.get_attribute("class") or ""))
        return dark_outside and clear_inside

    page.mouse.click(*at(frame, WHOLE))
    assert is_isolating()
    page.mouse.click(*at(frame, WHOLE))  # the same mask again
    assert not is_isolating()
    page.mouse.click(*at(frame, WHOLE))
    page.mouse.click(*at(frame, (70, 10)))  # no mask
    assert not is_isolating()
    page.mouse.click(*at(frame, WHOLE))
    page.locator("h1").click()
    assert not is_isolating()
    page.mouse.click(*at(frame, WHOLE))
    assert is_isolating()
    page.keyboard.press("Escape")
    assert not is_isolating()
    page.mouse.click(*at(frame, WHOLE))
    page.mouse.click(*at(page.locator(".frame").nth(1), APART))  # one at a time in all of the page
    assert not is_isolating()
    assert "isolating" in (page.locator(".frame").nth(1).get_attribute("class") or "")


def test_a_click_before_the_masks_are_painted_counts(page: Page) -> None:
    """On a slow machine somebody may click first."""
    frame = page.locator(".frame").first
    page.locator(".gallery[aria-busy=false]").wait_for()
    page.evaluate("Object.assign(pictures[0], { map: null, stale: true, near: false })")
    page.mouse.click(*at(frame, WHOLE))
    assert "isolating" in (frame.get_attribute("class") or "")


def test_keys_step_through_masks_isolate_and_enlarge(page: Page) -> None:
    frame = page.locator(".frame").first
    frame.focus()
    texts = []
    for _ in range(4):
        page.keyboard.press("ArrowRight")
        texts.append(tip(page).split(" predicted")[0])
    assert texts == ["Mask 1 of 3", "Mask 2 of 3", "Mask 3 of 3", "Mask 1 of 3"]
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("Enter")
    assert "isolating" in (frame.get_attribute("class") or "")
    assert alpha_at(page, "focus", WHOLE) > 100  # it is the part that is in the light
    page.keyboard.press("Escape")
    assert "isolating" not in (frame.get_attribute("class") or "")
    page.keyboard.press("Z")
    assert page.locator("#large").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("#large").is_hidden()


@pytest.mark.parametrize(
    ("name", "value", "left", "pixel", "text"),
    [
        ("iou", 0.8, 12, PART, "1,200 px"),  # without the part one sees the whole
        ("stability", 0.97, 6, WHOLE, ""),
        ("smallest", -1.5, 12, PART, "1,200 px"),
        ("largest", -0.75, 12, WHOLE, ""),
    ],
)
def test_sliders_act_on_all_overlays(
    page: Page, name: str, value: float, left: int, pixel: tuple[int, int], text: str
) -> None:
    before = [canvas(page, "masks", i) for i in range(6)]
    slide(page, name, value)
    assert shown(page).startswith(f"{left} of 18 masks shown")
    after = [canvas(page, "masks", i) for i in range(6)]
    assert all(a != b for a, b in zip(after, before, strict=True))
    page.mouse.move(*at(page.locator(".frame").first, pixel))
    assert text in tip(page)
    assert bool(tip(page)) == bool(text)
    assert f"{left // 6} of 3 masks" in page.locator(".tile").first.inner_text()
    page.locator("#reset").click()
    assert shown(page) == "18 of 18 masks shown"
    page.mouse.move(1, 1)
    assert [canvas(page, "masks", i) for i in range(6)] == before


def test_hidden_mask_is_no_longer_isolated(page: Page) -> None:
    page.mouse.click(*at(page.locator(".frame").first, PART))
    slide(page, "iou", 0.88)
    assert page.locator(".frame.isolating").count() == 0


def test_colours_follow_the_score(page: Page) -> None:
    before = canvas(page, "masks")
    page.locator("#colour").select_option("iou")
    by_iou = canvas(page, "masks")
    page.locator("#colour").select_option("stability")
    assert len({before, by_iou, canvas(page, "masks")}) == 3
    assert page.locator("#legend").inner_text().split() == ["0.91", "0.99"]
    page.locator("#colour").select_option("object")
    assert canvas(page, "masks") == before
    assert page.locator("#legend").is_hidden()


def test_names_filter_and_colour(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_output(str(tmp_path), masks=named_masks, categories=NAMES).output)
    before = canvas(page, "masks")
    page.locator("#colour").select_option("name")
    by_name = canvas(page, "masks")
    assert by_name != before
    assert page.locator("#legend").is_hidden()
    page.mouse.move(*at(page.locator(".frame").first, PART))
    page.locator("#tip").wait_for()  # a busy machine takes a while to show it
    assert "name part, 0.500" in tip(page)
    for choice, pixel in (("part", PART), ("whole", WHOLE), ("without a name", APART)):
        page.locator("#name").select_option(choice)
        assert shown(page).startswith("6 of 18 masks shown")
        assert alpha_at(page, "masks", pixel) > 0
        assert alpha_at(page, "masks", APART if pixel != APART else WHOLE) == 0
    page.locator("#reset").click()
    assert shown(page) == "18 of 18 masks shown"
    page.mouse.move(1, 1)
    assert canvas(page, "masks") == by_name


def test_large_image_lists_its_masks(page: Page) -> None:
    page.locator(".tile").first.hover()
    page.locator(".enlarge").first.click()
    large = page.locator("#large")
    assert "photo 0.png" in large.inner_text()
    frame = large.locator(".frame")
    box = frame.bounding_box()
    assert box is not None
    assert box["width"] > 600
    assert large.locator(".list button").count() == 3
    large.locator(".list button").nth(1).click()
    assert "isolating" in (frame.get_attribute("class") or "")
    page.mouse.move(*at(frame, PART))
    page.locator("#tip").wait_for()  # a busy machine takes a while to show it
    assert "100 px" in tip(page)
    assert "on" in (large.locator(".list button").nth(2).get_attribute("class") or "")
    page.keyboard.press("PageDown")
    assert "photo 1.png" in large.inner_text()
    page.locator("#previous").click()
    page.locator("#previous").click()
    assert "photo 5.png" in large.inner_text()
    page.locator("#close").click()
    page.locator(".tile .frame").nth(
        5
    ).wait_for()  # each in its place again, once the dialog has reported that it is closed
    assert page.locator(".tile .frame").count() == 6
    assert [name.inner_text() for name in page.locator(".tile .name").all()] == [f"photo {i}.png" for i in range(6)]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_follows_the_system_until_its_button_is_pressed(open_page: Open, output: str, scheme: str) -> None:
    page = open_page(output, color_scheme=scheme)

    def is_dark() -> bool:
        colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
        return sum(map(int, colour.strip("rgb()").split(","))) < 3 * 128

    assert is_dark() == (scheme == "dark")
    page.locator("#theme").click()
    assert is_dark() != (scheme == "dark")
    kept = "localStorage.getItem('samray-theme')"
    assert page.evaluate(kept) == ("light" if scheme == "dark" else "dark")
    page.reload()
    # Under load the browser may have lost what was stored a moment ago; then the page follows the system again.
    assert is_dark() == ((page.evaluate(kept) or scheme) == "dark")


@pytest.mark.parametrize("width", [360, 820, 1600])
def test_nothing_sticks_out_of_the_window(open_page: Open, output: str, width: int) -> None:
    page = open_page(output, viewport={"width": width, "height": 800})
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_page_without_an_image(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_output(str(tmp_path), errors=dict.fromkeys(range(6), "empty: no bytes")).output)
    assert "none could be labelled" in page.locator("main").inner_text()
    assert page.locator("#failures td", has_text="empty").count() == 1


def test_page_of_images_without_masks(open_page: Open, tmp_path: Path) -> None:
    page = open_page(write_output(str(tmp_path), masks=lambda index: []).output)
    assert shown(page) == "0 of 0 masks shown"
    page.locator(".frame").first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.keyboard.press("z")
    assert page.locator("#large").is_visible()


def test_hostile_names_and_errors_are_just_text(open_page: Open, tmp_path: Path) -> None:
    name = "<_script><img src=x onerror=alert({})>'\"&amp;{{{{7*7}}}}.png".format
    error = "truncated: </script><script>alert(1)</script> \u2028 ${alert(2)}"
    plan = write_output(str(tmp_path), errors={1: error}, name=name)
    page = open_page(plan.output)
    page.locator(".enlarge").first.click(force=True)
    assert page.locator("#large .name").inner_text() == name(0)
    assert "</script><script>alert(1)</script>" in page.locator("#failures").inner_text()
    assert page.locator("img[src=x]").count() == 0
    assert page.locator("script").count() == 2


def test_masks_that_lack_scores_are_shown(open_page: Open, tmp_path: Path) -> None:
    bare = {"predicted_iou": None, "stability_score": None, "point_coords": []}
    page = open_page(
        write_output(str(tmp_path), masks=lambda index: [{**mask, **bare} for mask in nested_masks(index)]).output
    )
    assert page.locator("#iou").is_hidden()
    page.locator(".gallery[aria-busy=false]").wait_for()  # painted: until then the masks are not under the mouse
    page.mouse.move(*at(page.locator(".frame").first, PART))
    page.locator("#tip").wait_for()  # a busy machine takes a while to show it
    assert "predicted IoU none" in tip(page)
    page.locator("#colour").select_option("iou")
    assert alpha_at(page, "masks", PART) > 0
