"""The house: which room imports which, and how large files, functions and rooms may become."""

import ast
import re
import sys
from pathlib import Path

import pytest

import timm_rdp

ROOT = Path(__file__).parent.parent
PACKAGE = "timm_rdp"

# From bottom to top. A room imports what is below it, never what is above it or beside it.
FLOORS = (
    ("errors",),
    ("core",),
    ("args", "callbacks"),
    ("", "fastai", "lightning", "transformers"),
    ("launch", "training"),
    ("study",),
    ("cli",),
)
FLOOR = {room: height for height, rooms in enumerate(FLOORS) for room in rooms}
OF_CORE = {*sys.stdlib_module_names, "torch", "timm", f"{PACKAGE}.core"}

LINES_OF_FILE = 320
LINES_OF_FUNCTION = 60
LINES_OF_ROOM = {"": 11230, "core": 2895, "launch": 470, "training": 3895, "study": 3265}
FILES_OF_TRAINING = 16


def modules() -> dict[str, Path]:
    """The files of the package by the name that they are imported by."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imports() -> dict[str, set[str]]:
    """What each module imports at its top, in functions and for type checkers alone."""
    files = modules()
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        names = found[name] = set()
        package = name if path.stem == "__init__" else name.rpartition(".")[0]
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                above = package.split(".")[: package.count(".") + 2 - node.level]
                base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
                inner = {f"{base}.{alias.name}" for alias in node.names}
                names |= inner & set(files)
                if inner - set(files):
                    names.add(base)
    return found


def own_imports() -> dict[str, set[str]]:
    """`imports` less what is not of the package."""
    return {name: names & set(modules()) for name, names in imports().items()}


def room(module: str) -> str:
    """The room of a module; "" for the package itself, which holds the public names."""
    name = module.split(".")[1] if "." in module else ""
    return "cli" if name == "__main__" else name


def test_every_file_is_in_a_room():
    assert {room(name) for name in modules()} <= set(FLOOR)


def test_no_room_imports_one_above_or_beside_it():
    wrong = [
        f"{name} -> {other}"
        for name, others in own_imports().items()
        for other in sorted(others)
        if room(name) != room(other) and FLOOR[room(name)] <= FLOOR[room(other)]
    ]
    assert not wrong, "\n".join(["imported, but not from below:", *wrong])


def test_core_imports_torch_timm_and_itself_alone():
    wrong = [
        f"{name} -> {other}"
        for name, others in imports().items()
        if room(name) == "core"
        for other in sorted(others)
        if not {other.split(".")[0], ".".join(other.split(".")[:2])} & OF_CORE
    ]
    assert not wrong, "\n".join(["imported by core:", *wrong])


def test_no_modules_import_each_other_in_a_circle():
    arrows = own_imports()

    def reached(module: str) -> set[str]:
        seen: set[str] = set()
        ahead = [module]
        while ahead:
            new = arrows[ahead.pop()] - seen
            seen |= new
            ahead += new
        return seen

    behind = {name: reached(name) for name in arrows}
    in_circles = [
        f"{name} -> {other}"
        for name, others in arrows.items()
        for other in sorted(others)
        if name in behind[other]
    ]
    assert not in_circles, "\n".join(["in circles:", *in_circles])


def test_no_file_is_too_long():
    long = [
        f"{name}: {n} lines"
        for name, path in modules().items()
        if (n := lines(path)) > LINES_OF_FILE
    ]
    assert not long, "\n".join(["too long:", *long])


def test_no_function_is_too_long():
    long = [
        f"{name}.{node.name}: {node.end_lineno - node.lineno + 1} lines"
        for name, path in modules().items()
        for node in ast.walk(tree(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > LINES_OF_FUNCTION
    ]
    assert not long, "\n".join(["too long:", *long])


@pytest.mark.parametrize("name", LINES_OF_ROOM)
def test_no_room_is_too_large(name):
    counted = [lines(path) for module, path in modules().items() if name in ("", room(module))]
    assert sum(counted) <= LINES_OF_ROOM[name]


def test_training_has_few_files():
    written = {name for name, path in modules().items() if lines(path)}  # not an empty __init__
    assert len([name for name in written if room(name) == "training"]) <= FILES_OF_TRAINING


def test_every_public_name_is_in_the_reference():
    reference = (ROOT / "docs" / "api.md").read_text()
    headings = set(re.findall(r"^#+ `(\w+)", reference, re.MULTILINE))
    public = set(timm_rdp.__all__)
    for name in timm_rdp.__all__:
        members = vars(getattr(timm_rdp, name)) if name[0].isupper() else {}
        public |= {m for m, value in members.items() if m[0] != "_" and callable(value)}
    assert public - headings == set()
