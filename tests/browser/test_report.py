"""The report page in headless Chromium, by keyboard and at phone width: `make test-report`, apart from `make test`."""

import json
from itertools import pairwise

import pytest

from benchmarks import RESULTS
from benchmarks.report.browser import Browser
from benchmarks.report.page import build
from tests.benchmarks.samples import write_results
from tests.browser.tab import accessible, press, troubles

WIDTHS = {"small phone": 320, "phone": 390, "tablet": 768, "desktop": 1280}
PAGES = ("sample", "committed")


@pytest.fixture(scope="module")
def browser():
    with Browser() as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The page of sample results and that of the committed ones; and what the first has for its slider."""
    folder = tmp_path_factory.mktemp("report")
    result = write_results(folder / "results")
    files = {name: folder / f"{name}.html" for name in PAGES}
    for name, results in (("sample", folder / "results"), ("committed", RESULTS)):
        files[name].write_text(build(results))
    return files, result


def texts(tab, *ids):
    return tab.value(f"{json.dumps(ids)}.map((id) => document.getElementById(id).textContent)")


def expected(result, step):
    """What the readings must say at a step of the slider, from the JSON alone."""
    sweep, pictures = result["sweep"], result["pictures"]
    threshold, refined, right, gmacs = (sweep[key][step] for key in ("threshold", "refined", "right", "gmacs"))
    return [
        "above 1, none stops" if threshold > 1 else f"{threshold:.3f}",
        f"{100 * (1 - refined / pictures):.1f} %",
        f"{pictures - refined:,}",
        f"{100 * (refined / pictures):.1f} %",
        f"{refined:,}",
        f"{100 * (right / pictures):.1f} %",
        f"{gmacs:.4f}",
        f"{100 * (1 - gmacs / result['teacher']['gmacs']):.1f} %",
    ]


READINGS = ("shown", "stopped", "stopped-count", "refined", "refined-count", "accuracy", "gmacs", "saved")


def slider_at(tab):
    return int(tab.value("document.getElementById('threshold').value"))


def test_keys_drive_the_slider_and_it_shows_what_the_json_says(browser, pages):
    files, result = pages
    tab = browser.open(files["sample"])
    assert texts(tab, *READINGS) == expected(result, slider_at(tab)), "on loading"
    tab.value("document.getElementById('threshold').focus()")
    last, seen = len(result["sweep"]["threshold"]) - 1, []
    for key, times in (("Home", 1), ("ArrowRight", 7), ("PageUp", 3), ("ArrowLeft", 2), ("End", 1), ("PageDown", 4)):
        press(tab, key, times)
        seen.append(slider_at(tab))
        assert texts(tab, *READINGS) == expected(result, seen[-1]), f"after {key}"
    assert seen[0] == 0 and seen[1] == 7 and seen[4] == last and len(set(seen)) == len(seen)
    assert 7 < seen[2] < last and seen[3] == seen[2] - 2 and seen[5] < last


def test_the_point_and_the_pictures_move_along(browser, pages):
    files, result = pages
    tab = browser.open(files["sample"])
    tab.value("document.getElementById('threshold').focus()")
    drawing = tab.value("({...document.getElementById('curve').dataset})")
    x, y = (list(map(float, drawing[axis].split())) for axis in "xy")
    sweep = result["sweep"]
    for key in ("Home", "PageUp", "End", "PageDown"):
        press(tab, key)
        step = slider_at(tab)
        point = tab.value("['cx', 'cy'].map((name) => Number(document.getElementById('point').getAttribute(name)))")
        values = sweep["gmacs"][step], 100 * sweep["right"][step] / result["pictures"]
        for found, value, (low, high, first, end) in zip(point, values, (x, y), strict=True):
            assert found == pytest.approx(first + (value - low) / (high - low) * (end - first), abs=0.01)
        threshold, examples = sweep["threshold"][step], result["examples"]
        going = [each["margin"] < threshold for each in examples]
        cards = tab.value(
            "[...document.querySelectorAll('.examples li')].map((card) => [card.classList.contains('refined'), "
            "card.querySelector('.stop').textContent, card.querySelector('.answer').textContent])"
        )
        for card, each, refined in zip(cards, examples, going, strict=True):
            guess = each["guesses"][refined]
            said = "goes on to the fine level" if refined else "stops at the coarse level"
            assert card == [refined, said, "✓ right" if guess == each["name"] else f"✗ {guess}"]
        (counted,) = texts(tab, "counted")
        assert f"{len(going) - sum(going)} stop and {sum(going)} go on" in counted


def test_dropped_patches_are_veiled(browser, pages):
    tab = browser.open(pages[0]["sample"])
    dropped = tab.value(
        "[...document.querySelectorAll('.veil')].map((each) => each.getAttribute('d').split('M').length - 1)"
    )
    assert dropped == [18] * 6, "half of 36 patches, three methods, two pictures"
    drawn = tab.value("[...document.querySelectorAll('svg.patches')].map((each) => each.getBBox().width)")
    assert drawn == [96] * 8, "the picture itself, and again under every veil"


def test_the_committed_results_have_the_slider_or_its_command(browser, pages):
    files, _ = pages
    tab, result = browser.open(files["committed"]), json.loads((RESULTS / "waveclip-fig1.json").read_text())
    if "sweep" in result:
        assert texts(tab, *READINGS) == expected(result, slider_at(tab))
    else:
        said = tab.value("document.getElementById('threshold-section').parentElement.textContent")
        assert "Not run: make reproduce-waveclip-fig1" in said


@pytest.mark.parametrize("name", PAGES)
def test_it_asks_nobody_and_complains_of_nothing(browser, pages, name):
    tab = browser.open(pages[0][name])
    assert troubles(tab) == []
    assert tab.value("[...document.images].every((image) => image.complete && image.naturalWidth > 0)")


BEYOND = """[...document.querySelectorAll('body *')].filter((element) => {
  const box = element.getBoundingClientRect();
  const shown = box.width > 0 && !element.closest('.skip, svg') && !element.parentElement.closest('.scroll, pre');
  return shown && (box.right > innerWidth + 0.5 || box.left < -0.5);
}).map((element) => element.outerHTML.slice(0, 120))"""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_wider_than_the_window(browser, pages, name, width, dark):
    tab = browser.open(pages[0][name], width, 844, phone=width < 500, dark=dark)
    tab.value("document.querySelectorAll('details').forEach((each) => { each.open = true; })")
    assert tab.value("innerWidth") == width
    assert tab.value("document.documentElement.scrollWidth") <= width
    assert tab.value(BEYOND) == []


def focused(tab):
    return tab.value("document.activeElement.id || document.activeElement.className")


def test_the_keyboard_reaches_everything(browser, pages):
    tab = browser.open(pages[0]["sample"])
    press(tab, "Tab")
    assert focused(tab) == "skip"
    assert tab.value("document.activeElement.getBoundingClientRect().left") >= 0, "shown while it is focused"
    press(tab, "Enter")
    assert tab.value("location.hash") == "#glance" and focused(tab) == "glance"
    reached = []
    while "threshold" not in reached and len(reached) < 20:
        press(tab, "Tab")
        reached.append(focused(tab))
    assert reached[-1] == "threshold", "the slider is the next thing that can be moved"
    outline = tab.value("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid", "and shows that it has the focus"
    tab.value("document.querySelector('details:not([open]) summary').focus()")
    press(tab, "Enter")
    assert tab.value("document.activeElement.parentElement.open")


def test_it_speaks_to_those_who_do_not_see_it(browser, pages):
    tab = browser.open(pages[0]["sample"])
    (slider,) = accessible(tab, "slider")
    assert slider["name"].startswith("Threshold of the margin") and "Arrow keys" in slider["description"]
    spoken = tab.value("document.getElementById('threshold').getAttribute('aria-valuetext')")
    assert all(part in spoken for part in texts(tab, "shown", "refined", "accuracy", "gmacs"))
    images = accessible(tab, "image")
    assert len(images) > 7 and all(image["name"] for image in images), "every picture has a text"
    assert all(region["name"] for region in accessible(tab, "region"))
    levels = tab.value("[...document.querySelectorAll('h1, h2, h3')].map((each) => Number(each.tagName[1]))")
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in pairwise(levels)), "no level is left out"
    ids = tab.value("[...document.querySelectorAll('[id]')].map((each) => each.id)")
    assert len(ids) == len(set(ids))
    links = tab.value("[...document.querySelectorAll('a')].map((each) => each.getAttribute('href'))")
    assert {link for link in links if link.startswith("#")} == set(links) and {link[1:] for link in links} <= set(ids)


CONTRAST = """(() => {
  const canvas = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const pixel = (colours) => {
    canvas.clearRect(0, 0, 1, 1);
    for (const colour of colours) { canvas.fillStyle = colour; canvas.fillRect(0, 0, 1, 1); }
    return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3);
  };
  const light = (rgb) => rgb.map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const low = {};
  for (const element of document.querySelectorAll('body *:not(svg *)')) {
    const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
    if (!own || element.closest('script, style, noscript') || !element.getBoundingClientRect().width) continue;
    const under = [];
    for (let at = element; at; at = at.parentElement) under.unshift(getComputedStyle(at).backgroundColor);
    const back = pixel(under), front = pixel([...under, getComputedStyle(element).color]);
    const [a, b] = [light(back), light(front)].sort((p, q) => q - p);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) low[element.tagName + '.' + element.className] = ratio;
  }
  return low;
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_by_the_web_guidelines_ratio(browser, pages, dark):
    """WCAG 2's relative luminance: 4.5 to 1 at least, in either scheme."""
    tab = browser.open(pages[0]["sample"], dark=dark)
    assert tab.value(CONTRAST) == {}
    assert tab.value("matchMedia('(prefers-color-scheme: dark)').matches") is dark
    grounds = tab.value("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, grounds.removeprefix("rgb(").rstrip(")").split(","))) < 200) is dark
