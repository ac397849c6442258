"""The documents are true: the drawing of the rooms is the tree; named files and classes exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mellmpi"
DESIGN = (ROOT / "docs" / "design.md").read_text()
DOCUMENTS = ("docs/design.md", "docs/structured-output.md", "CONTRIBUTING.md", "bench/README.md")
INDENT = 4  # characters of one level of the drawing
FILES = {
    path.relative_to(ROOT).as_posix()
    for folder in ("mellmpi", "tests", "bench", "docs", "launch")
    for path in (ROOT / folder).rglob("*")
    if path.is_file()
} | {path.name for path in ROOT.iterdir() if path.is_file()}
SOURCE = "\n".join(path.read_text() for path in sorted(PACKAGE.rglob("*.py")))


def drawn_rooms(text):
    """Folders of the first code block, as paths in the package: "transport/mpi"."""
    rooms, parents = [], []
    for line in text.split("```")[1].splitlines():
        if (found := re.match(r"([│├└─ ]+)(\w+)/", line)) is None:
            continue
        depth = len(found[1]) // INDENT - 1
        parents = [*parents[:depth], found[2]]
        rooms.append("/".join(parents))
    return rooms


def quoted(text):
    """What the text has in backticks, code blocks aside."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))


def test_the_drawing_of_the_rooms_is_the_tree_of_folders():
    folders = {path.parent for path in PACKAGE.rglob("*.py")} - {PACKAGE}
    drawn = drawn_rooms(DESIGN)
    assert sorted(drawn) == sorted(path.relative_to(PACKAGE).as_posix() for path in folders)


def test_a_drawing_with_another_folder_is_noticed():
    drawing = "```\nmellmpi/    All\n├── a/       A\n│   └── b/   B\n└── c/       C\n```"
    assert drawn_rooms(drawing) == ["a", "a/b", "c"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    names = {part for quote in quoted((ROOT / document).read_text()) for part in quote.split()}
    for name in names:
        if re.fullmatch(r"[\w./]+\.(py|md|sh|json|sbatch|toml)", name):
            ends = (f"/{name}", f"mellmpi/{name}")
            assert name in FILES or any(path.endswith(ends) for path in FILES), name


@pytest.mark.parametrize("document", DOCUMENTS)
def test_classes_that_a_document_names_exist(document):
    for name in quoted((ROOT / document).read_text()):
        if found := re.match(r"([A-Z]\w*[a-z]\w*)([.(]|$)", name):
            assert re.search(rf"\b(class|def) {found[1]}\b", SOURCE), name
