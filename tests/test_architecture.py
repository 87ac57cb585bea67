"""The floors of the house: imports only go down."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FLOORS = {
    0: "errors text atomic config cli boxes schedule stopping provenance run_folder",
    1: "models inference mistakes data metrics ema plots figures error_grids explain faithfulness logbook",
    2: "loss",
    3: "tasks doctor",
    4: "evaluation prediction checkpoint pretrained mirror export run panels",
    5: "processes loaders state meter engine tuning space demo",
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names.split()}
SCRIPTS = 6
MODULES = sorted([*(ROOT / "yolo").rglob("*.py"), *ROOT.glob("*.py")])


def _part(name: str) -> str:
    """`yolo.data.voc` belongs to the part `data`."""
    words = name.split(".")
    return words[1] if len(words) > 1 else ""


def _imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            if node.module == "yolo":
                names |= {f"yolo.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_only_go_down(path: Path):
    inside = path.is_relative_to(ROOT / "yolo")
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    floor = FLOOR_OF[_part(name)] if inside and path.stem != "__init__" else SCRIPTS
    for imported in _imports(path):
        if imported.startswith("yolo.") and _part(imported) in FLOOR_OF:
            assert FLOOR_OF[_part(imported)] <= floor, f"{name} imports {imported} from a higher floor"


def test_there_are_no_circles():
    graph = {}
    for path in (ROOT / "yolo").rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = {imported for imported in _imports(path) if imported.startswith("yolo.")}
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"circle: {' -> '.join([*trail, name])}"
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_only_one_module_imports_lightning():
    importers = {
        path.stem
        for path in (ROOT / "yolo").rglob("*.py")
        if any(name.startswith("lightning") for name in _imports(path))
    }
    assert importers == {"processes"}


def test_every_module_of_the_package_has_a_floor():
    parts = {
        _part(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for path in (ROOT / "yolo").rglob("*.py")
    }
    assert parts - {"__init__"} == set(FLOOR_OF)
