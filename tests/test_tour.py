"""docs/tour.md: ten stops, each a file and a name that exist, in the order of ARCHITECTURE.md's two flows."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.machine import ROOT

pytestmark = pytest.mark.quick

TOUR = (ROOT / "docs/tour.md").read_text()
STOPS = re.findall(r"^### (\d+)\. .+\n\n`([\w/]+\.py)`, `([\w.]+)`$", TOUR, re.MULTILINE)


def names(path: str) -> set[str]:
    """Classes and functions of a module, and methods as ``Class.method``."""
    found = set()
    for node in ast.parse((ROOT / path).read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{inner.name}"
                for inner in node.body
                if isinstance(inner, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


def flow(name: str) -> list[str]:
    """The modules of one flow of ARCHITECTURE.md, in its order."""
    text = (ROOT / "ARCHITECTURE.md").read_text()
    (line,) = re.findall(rf"^{name} +(\S+\.py(?: → \S+\.py)+)", text, re.MULTILINE)
    return [f"asgi_cluster/{module}" for module in line.split(" → ")]


def test_tour_has_ten_stops_in_order() -> None:
    """Numbered from 1, five for the request and five for the event, no heading without its file and name."""
    assert [int(number) for number, _, _ in STOPS] == list(range(1, 11))
    assert len(re.findall(r"^### ", TOUR, re.MULTILINE)) == 10
    request, event = TOUR.split("## An event\n")
    assert request.count("\n### ") == event.count("\n### ") == 5


@pytest.mark.parametrize(("number", "path", "name"), STOPS, ids=[name for _, _, name in STOPS])
def test_stop_of_the_tour_is_there(number: str, path: str, name: str) -> None:
    """The file exists and defines the name."""
    assert name in names(path), f"stop {number}: {path} has no {name}"


def test_names_in_the_text_of_the_tour_are_there() -> None:
    """A class, a method or a function that the text of a stop mentions is in that stop's file, or in one that
    the text names.
    """
    parts = re.split(r"^### \d+\. .+\n\n", TOUR, flags=re.MULTILINE)[1:]
    for (_, path, name), part in zip(STOPS, parts, strict=True):
        text = re.split(r"^## ", part.split("\n", 1)[1], flags=re.MULTILINE)[0]
        others = re.findall(r"`(asgi_cluster/[\w/]+\.py)`", text)
        known = {last for module in (path, *others) for last in (n.rpartition(".")[2] for n in names(module))}
        source = "".join((ROOT / module).read_text() for module in (path, *others))
        for word in re.findall(r"`([A-Za-z_]+)`", text):
            assert word in known or re.search(rf"\b{word}\b", source), f"{name}: {word}"


@pytest.mark.parametrize(("name", "stops"), [("request", STOPS[:5]), ("event", STOPS[5:])])
def test_stops_follow_the_flows(name: str, stops: list[tuple[str, str, str]]) -> None:
    """Stops whose module is in a flow of ARCHITECTURE.md come in the order of that flow."""
    modules = flow(name)
    passed = [modules.index(path) for _, path, _ in stops if path in modules]
    assert len(passed) >= 3
    assert passed == sorted(passed)


def test_line_counts_that_the_tour_claims_are_true() -> None:
    """ "in fifty lines" is a claim: the class is not longer than that and a quarter more."""
    for number, (_, path, name) in enumerate(STOPS, 1):
        part = TOUR.split(f"\n### {number}. ")[1].split("\n### ")[0]
        if (claim := re.search(r"in (\w+) lines", part)) is None:
            continue
        most = {"twenty": 20, "fifty": 50, "hundred": 100}[claim[1]]
        (node,) = [
            each
            for each in ast.parse((ROOT / path).read_text()).body
            if isinstance(each, ast.ClassDef) and each.name == name.partition(".")[0]
        ]
        assert node.end_lineno is not None
        assert node.end_lineno - node.lineno + 1 <= most * 1.25
