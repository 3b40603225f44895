"""The documents are true: figures, pictures, links, names and the glossary."""

from __future__ import annotations

import re
import tokenize
from pathlib import Path

import pytest

from tests.support.machine import ROOT

pytestmark = pytest.mark.quick

README = (ROOT / "README.md").read_text()
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text()
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]
LARGEST_PICTURE = 200_000
MOST_WORDS = 12

RETIRED = """
    Audience Feed Link CommandLink Echo HeldEcho Packet Wave Reception Attendance Verifier Flight World Seat
    Draft Ending
"""
"""Names that classes had before; the documents use those of now."""

PERSONIFIED = (
    r"\b(nobody|somebody|everybody|hears?|heard|deaf|lets? go|wakes up|asleep|complains?|knows|knew|tells?|"
    r"told|forgets?|forgotten|learns?|believes?|echo|echoes|packets?|flights?|audiences?)\b"
)
"""Words for people, which no component is, and words of earlier versions that no glossary explains."""


def test_readme_begins_with_three_measured_numbers_and_a_picture() -> None:
    """In the first ten lines; each number is one that docs/performance.md has."""
    first = README.splitlines()[:10]
    numbers = [found[1] for line in first if (found := re.match(r"- \*\*(.+?)\*\*", line))]
    assert len(numbers) == 3
    measured = (ROOT / "docs/performance.md").read_text()
    for number in numbers:
        assert number.removesuffix(" µs") in measured, number
    assert any(line.startswith("![") for line in first)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_pictures_of_documents_are_there_and_small(document: Path) -> None:
    """At most 200 KB each."""
    for target in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", document.read_text()):
        assert (document.parent / target).stat().st_size <= LARGEST_PICTURE, target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_of_documents_lead_somewhere(document: Path) -> None:
    """Relative links name files of the repository, from where the document is."""
    for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", document.read_text()):
        assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_the_names_of_now_and_plain_words(document: Path) -> None:
    """No class name of an earlier version, and no component that hears or is nobody."""
    text = re.sub(r"^```.*?^```", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
    for name in RETIRED.split():
        assert not re.search(rf"`{name}`", text), name
    assert not (found := re.search(PERSONIFIED, text, re.IGNORECASE)), found


@pytest.mark.parametrize("folder", ["asgi_cluster", "demo", "loadtest"])
def test_comments_and_texts_of_the_code_use_plain_words(folder: str) -> None:
    """Docstrings, comments, log lines and error messages."""
    for path in sorted((ROOT / folder).rglob("*.py")):
        with path.open("rb") as file:
            for token in tokenize.tokenize(file.readline):
                if token.type in (tokenize.COMMENT, tokenize.STRING):
                    found = re.search(PERSONIFIED, token.string, re.IGNORECASE)
                    assert not found, f"{path.relative_to(ROOT)}:{token.start[0]}: {found}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_paths_in_documents_exist(document: Path) -> None:
    """What a document names as a file of the package, of the tests or of the documents is there."""
    text = document.read_text()
    for path in re.findall(r"`((?:asgi_cluster|tests|docs|demo|loadtest)/[\w/.-]+\.\w+)`", text):
        assert (ROOT / path).exists(), path


def test_glossary_is_short_and_of_words_that_the_code_uses() -> None:
    """At most twelve words, each explained once and found in a name of the package."""
    (section,) = re.findall(r"^## Glossary\n(.*?)^## ", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    words = re.findall(r"^\| \*\*(.+?)\*\* \| .+ \|$", section, re.MULTILINE)
    assert 1 <= len(words) == len(set(words)) <= MOST_WORDS
    source = "\n".join(path.read_text() for path in (ROOT / "asgi_cluster").rglob("*.py")).lower()
    for word in words:
        assert word.lower().replace(" ", "") in source.replace("_", ""), word


def layout() -> dict[str, set[str]]:
    """The modules that ARCHITECTURE.md names, by folder."""
    (block,) = re.findall(r"^```\nasgi_cluster/\n(.*?)^```", ARCHITECTURE, re.MULTILINE | re.DOTALL)
    found: dict[str, set[str]] = {}
    folder = [""]
    for line in block.splitlines():
        indent = len(line) - len(line.lstrip())
        if not line.strip() or indent == 0:
            continue
        opened = re.match(r" +([a-z]+)/", line)
        if indent in (2, 4):
            folder = folder[: 1 if indent == 2 else 2] + ([opened[1]] if opened else [])
        where = "/".join(folder[1:])
        found.setdefault(where, set()).update(re.findall(r"\b[a-z_]+\.py\b", line))
    return found


def test_layout_of_the_architecture_is_that_of_the_package() -> None:
    """Every module is named in its folder, and no other."""
    package = ROOT / "asgi_cluster"
    there: dict[str, set[str]] = {}
    for path in package.rglob("*.py"):
        if path.name != "__init__.py":
            folder = path.parent.relative_to(package).as_posix().removeprefix(".")
            there.setdefault(folder, set()).add(path.name)
    named = {folder: modules for folder, modules in layout().items() if modules}
    lacking = {folder: sorted(there[folder] - named.get(folder, set())) for folder in there}
    surplus = {folder: sorted(named[folder] - there.get(folder, set())) for folder in named}
    assert not any(lacking.values()), f"ARCHITECTURE.md does not name {lacking}"
    assert not any(surplus.values()), f"ARCHITECTURE.md names what is not there: {surplus}"


def test_backticked_paths_of_the_architecture_exist() -> None:
    """Below the package, where they are written without its name."""
    text = re.sub(r"^```.*?^```", "", ARCHITECTURE, flags=re.MULTILINE | re.DOTALL)
    for path in re.findall(r"`([\w]+(?:/[\w]+)*\.py)`", text):
        assert (ROOT / "asgi_cluster" / path).exists() or (ROOT / path).exists(), path
