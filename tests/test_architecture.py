"""The floors of the house: imports only go down, none runs sideways, and there are no circles."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {  # a part is a package of yolo/ or a module beside them
    0: "errors files boxes config",
    1: "cli schedule models data metrics",
    2: "losses viz",
    3: "tasks check_data",
    4: "runs",
    5: "inference",
    6: "explain",
    7: "engine app",
}
FLOOR_OF = {part: floor for floor, parts in FLOORS.items() for part in parts.split()}
SCRIPTS = max(FLOORS) + 1
MODULES = sorted([*(ROOT / "yolo").rglob("*.py"), *ROOT.glob("*.py")])


def part_of(module: str) -> str:
    """`yolo.data.voc` belongs to the part `data`; a script to itself."""
    words = module.split(".")
    return words[1] if len(words) > 1 else words[0]


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imports_of(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.startswith("yolo.")}


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_only_go_down_and_never_sideways_between_packages(path: Path):
    part = part_of(name_of(path))
    floor = FLOOR_OF.get(part, SCRIPTS)
    for imported in sorted(imports_of(path)):
        other = part_of(imported)
        if other == part or other not in FLOOR_OF:
            continue
        beside = FLOOR_OF[other] == floor and not (ROOT / "yolo" / part).is_dir()
        below = FLOOR_OF[other] < floor
        assert below or beside, f"{name_of(path)} imports {imported}, which lies on no lower floor"


def test_there_are_no_circles_between_files():
    files = {name_of(path): path for path in (ROOT / "yolo").rglob("*.py")}
    graph = {
        name: {other for other in imports_of(path) if other in files}
        for name, path in files.items()
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for imported in graph[name]:
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_one_module_imports_lightning():
    importers = {
        name_of(path)
        for path in (ROOT / "yolo").rglob("*.py")
        if any(
            isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning")
            for node in ast.walk(ast.parse(path.read_text()))
        )
    }
    assert importers == {"yolo.engine.fabric"}


def test_every_module_of_the_package_has_a_floor():
    parts = {part_of(name_of(path)) for path in (ROOT / "yolo").rglob("*.py")} - {
        "yolo",
        "__main__",
    }
    assert parts == set(FLOOR_OF)
