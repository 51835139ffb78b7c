"""Reports as they are seen: on a desk and on a phone, light and dark."""

from __future__ import annotations

import pytest
from browser import LAYOUT, PHONE, SCHEMES, WIDE, needs_chromium, pixels, seen
from report_pages import PAGES, hostile_page, pages

from qrecipe.measure.pages.page import save_page
from qrecipe.measure.pages.sections import Figure

pytestmark = pytest.mark.browser

NAMES = (*PAGES, "hostile")


@pytest.fixture(scope="module", autouse=True)
def chromium():
    needs_chromium()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    for name in NAMES:
        save_page(page_of(name), folder / f"{name}.html")
    return folder


def page_of(name):
    return hostile_page() if name == "hostile" else pages()[name]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", [WIDE, PHONE])
@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_a_page_is_cut_off_or_hard_to_read(name, width, scheme, folder):
    picture = folder / f"{name}-{width}-{scheme}.png"
    layout = seen(folder / f"{name}.html", width, scheme, LAYOUT, picture)
    assert layout["width"] <= width
    for problem in ("outside", "cut", "beyond", "overlapping", "faint", "small"):
        assert layout[problem] == [], problem
    assert (sum(layout["paper"][:3]) < 3 * 64) is (scheme == "dark")
    shot = pixels(picture)
    assert shot.shape == (layout["height"], width, 3)
    margins = (shot[:, :6], shot[:, -6:], shot[:6], shot[-6:])
    assert all((margin == layout["paper"][:3]).all() for margin in margins)
    figures = [section for section in page_of(name).sections if isinstance(section, Figure)]
    assert len(layout["images"]) == sum(len(figure.drawings) for figure in figures) >= 3
    for image in layout["images"]:
        assert image["width"] >= 0.85 * image["natural"] > 0  # or its words would be too small
        assert is_drawn(shot, image)


def is_drawn(shot, box):
    """Whether what can be seen of an image has several colours."""
    top, left = round(box["y"]), round(box["x"])
    region = shot[top : top + round(box["height"]), left : left + round(box["width"])]
    colours = {tuple(colour) for colour in region.reshape(-1, 3)[::17]}
    return len(colours) > 3


@pytest.mark.parametrize("percent", [50, 200])
def test_the_graph_is_shown_in_the_chosen_size_and_moves_in_its_box(percent, folder):
    size = f"""(() => {{
      const svg = document.querySelector(".flow svg"), box = svg.parentElement;
      const before = svg.getBoundingClientRect();
      document.querySelector('[name=size][value="{percent}"]').click();
      const after = svg.getBoundingClientRect();
      box.scrollTo(40, 30);
      return {{widths: [before.width, after.width], heights: [before.height, after.height],
               moved: [box.scrollLeft, box.scrollTop], page: document.documentElement.scrollWidth}};
    }})()"""
    found = seen(folder / "hostile.html", PHONE, "light", size)
    for before, after in (found["widths"], found["heights"]):
        assert after == pytest.approx(before * percent / 100, abs=1)
    assert found["moved"][1] == 30
    assert (found["moved"][0] == 40) is (found["widths"][1] > PHONE)
    assert found["page"] <= PHONE


def test_links_of_a_page_lead_to_its_sections(folder):
    lost = """[...document.querySelectorAll("a")].filter(
      link => !document.querySelector(link.getAttribute("href"))).map(link => link.href)"""
    assert seen(folder / "tuning.html", WIDE, "light", lost) == []


def test_a_page_fits_on_paper(folder):
    """Printed in the width of a sheet, where nothing can be moved."""
    page = folder / "printed.html"
    html = (folder / "sensitivity.html").read_text()
    page.write_text(html.replace("@media print", "@media all"))
    layout = seen(page, 760, "light", LAYOUT)
    assert layout["width"] <= 760
    assert layout["outside"] == layout["cut"] == []
