from __future__ import annotations

import math
import re
from xml.etree import ElementTree

import pytest

from nemo_pvs.reporting.figures.loss import loss_figure, standalone
from nemo_pvs.reporting.results import Results

from .conftest import make_arm


def _texts(svg: str) -> list[str]:
    return [
        "".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter() if element.tag == "text"
    ]


def test_every_target_has_a_panel_with_its_lines_its_parent_and_its_gap(results: Results) -> None:
    texts = _texts(loss_figure(results))
    for expected in ("depth", "width", "0.10 nats", "0.20 nats", "training tokens (k)"):
        assert expected in texts
    assert texts.count("parent 2.40") == 2
    assert [text for text in texts if text.startswith("depth, ")] == [
        "depth, pruned (starts at 4.00)",
        "depth, scratch (starts at 6.90)",
    ]


def test_colours_come_from_the_page(results: Results) -> None:
    svg = loss_figure(results)
    assert set(re.findall(r"#[0-9a-f]{3,8}\b", svg)) == {"#d5d5d5", "#b34b00", "#0072b2"}  # fallbacks within var()
    for colour in re.findall(r"(?:fill|stroke): ([^;\"]+)", svg):
        assert colour == "none" or colour == "currentColor" or colour.startswith("var(--"), colour
    assert "var(--series-1," in svg
    assert "var(--series-scratch," in svg


def test_lines_differ_without_colour(results: Results) -> None:
    results.arms.append(make_arm("depth", pruned=True, losses=[4, 2.7, 2.6, 2.34], shape=results.arms[0].shape))
    root = ElementTree.fromstring(loss_figure(results))
    panel = next(element for element in root.iter("g") if element.get("id") == "axes_1")
    styles = [path.get("style", "") for path in panel.iter("path")]
    assert any("var(--series-1" in style and "dasharray" not in style for style in styles)
    assert any("var(--series-scratch" in style and "dasharray" in style for style in styles)
    markers = {
        style: path.get("d") for path in panel.iter("path") if "stroke-linejoin" in (style := path.get("style", ""))
    }
    assert len(set(markers.values())) >= 3


def test_a_page_can_hold_it_as_it_is(results: Results) -> None:
    results.arms[0].target = results.arms[1].target = 'a "quoted" $x$ <target>'
    svg = loss_figure(results)
    assert svg.startswith("<svg")
    assert 'a "quoted" $x$ <target>' in _texts(svg)
    for forbidden in ("http", "<style", "<?xml", "<!DOCTYPE", "<metadata"):
        assert forbidden not in svg
    assert "a &quot;quoted&quot; $x$ &lt;target&gt;" in svg[: svg.index(">")]


@pytest.mark.slow
def test_the_same_results_give_the_same_figure(results: Results) -> None:
    assert loss_figure(results) == loss_figure(results)


def test_a_diverged_run_is_said_to_have_diverged(results: Results) -> None:
    results.arms[1].validation[-1].loss = math.nan
    texts = _texts(loss_figure(results))
    assert "depth, scratch (starts at 6.90) (diverged)" in texts
    assert not any("nan" in text for text in texts)
    assert "0.10 nats" not in texts


@pytest.mark.parametrize("losses", [[], [3.0]])
def test_little_or_nothing_measured_is_drawn_all_the_same(results: Results, losses: list[float]) -> None:
    for arm in results.arms:
        arm.validation = arm.validation[: len(losses)]
    results.parent.validation_loss = None
    assert bool(loss_figure(results)) == bool(losses)


def test_panels_are_wrapped_and_none_is_empty(results: Results) -> None:
    results.arms.append(make_arm("third", pruned=True, losses=[4, 3, 2.6, 2.34], shape=results.arms[0].shape))
    root = ElementTree.fromstring(loss_figure(results))
    assert [element.get("id") for element in root.iter("g") if (element.get("id") or "").startswith("axes_")] == [
        "axes_1",
        "axes_2",
        "axes_3",
    ]


def test_standalone_figure_is_a_whole_svg_file(results):
    root = ElementTree.fromstring(standalone(loss_figure(results)))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert root[0].tag.endswith("style")
