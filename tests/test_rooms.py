"""No import runs upwards: a room imports what the table allows, and no files go in circles."""

import ast
import re

import pytest

pytestmark = pytest.mark.quick

# Room -> the rooms that it may import, each of which stands above it. A room is a package or a
# module with all that no longer name covers; an allowed name allows the rooms inside it as well.
# `docs/design.md` shows the same table.
ROOMS = {
    "boundjax.typing": (),
    "boundjax.numerics": ("boundjax.typing",),
    "boundjax.sharding": ("boundjax.typing",),
    "boundjax.precision": (),
    "boundjax.windows": ("boundjax.numerics",),
    "boundjax.slopes": (),
    "boundjax.stochastic": ("boundjax.typing",),
    "boundjax.cache": (),
    "boundjax.properties": (),
    "boundjax.vnnlib": ("boundjax.properties",),
    "boundjax.check": (),
    "boundjax.check_onnx": (),
    "boundjax.check_attack": ("boundjax.check",),
    "boundjax.check_tree": ("boundjax.check", "boundjax.vnnlib"),
    "boundjax.check_exact": ("boundjax.check",),
    "boundjax.sets": (
        "boundjax.typing",
        "boundjax.numerics",
    ),
    "boundjax.ir": (
        "boundjax.typing",
        "boundjax.windows",
        "boundjax.sets",
    ),
    "boundjax.ops": (
        "boundjax.numerics",
        "boundjax.precision",
        "boundjax.windows",
        "boundjax.sets",
        "boundjax.ir",
    ),
    "boundjax.tracing": (
        "boundjax.precision",
        "boundjax.sets",
        "boundjax.ir",
        "boundjax.ops",
    ),
    "boundjax.transforms": (
        "boundjax.typing",
        "boundjax.numerics",
        "boundjax.precision",
        "boundjax.windows",
        "boundjax.slopes",
        "boundjax.sets",
        "boundjax.ir",
        "boundjax.ops",
        "boundjax.tracing",
    ),
    "boundjax.search": (
        "boundjax.typing",
        "boundjax.sharding",
        "boundjax.precision",
        "boundjax.slopes",
        "boundjax.properties",
        "boundjax.sets",
        "boundjax.ir",
        "boundjax.ops",
        "boundjax.tracing",
        "boundjax.transforms",
    ),
    "boundjax.training": (
        "boundjax.numerics",
        "boundjax.sets",
    ),
    "boundjax.attacks": (
        "boundjax.stochastic",
        "boundjax.sets",
        "boundjax.training",
    ),
    "boundjax.diagnostics": (
        "boundjax.sets",
        "boundjax.transforms",
        "boundjax.training",
    ),
    "boundjax.certification": (
        "boundjax.typing",
        "boundjax.sharding",
        "boundjax.precision",
        "boundjax.slopes",
        "boundjax.stochastic",
        "boundjax.properties",
        "boundjax.check",
        "boundjax.check_onnx",
        "boundjax.check_attack",
        "boundjax.check_tree",
        "boundjax.sets",
        "boundjax.ir",
        "boundjax.tracing",
        "boundjax.transforms",
        "boundjax.search",
        "boundjax.training",
    ),
    "boundjax.onnx": ("boundjax.ops",),
    "boundjax.verify": (
        "boundjax.cache",
        "boundjax.vnnlib",
        "boundjax.sets",
        "boundjax.ir",
        "boundjax.search",
        "boundjax.certification",
        "boundjax.onnx",
    ),
    "boundjax": (
        "boundjax.precision",
        "boundjax.slopes",
        "boundjax.stochastic",
        "boundjax.properties",
        "boundjax.cache",
        "boundjax.vnnlib",
        "boundjax.sets",
        "boundjax.ops",
        "boundjax.tracing",
        "boundjax.transforms",
        "boundjax.search",
        "boundjax.training",
        "boundjax.attacks",
        "boundjax.diagnostics",
        "boundjax.certification",
        "boundjax.onnx",
    ),
    "experiments.settings": (),
    "experiments.data": ("experiments.settings",),
    "experiments.models": (
        "boundjax",
        "experiments.settings",
    ),
    "experiments.methods": (
        "boundjax",
        "experiments.settings",
    ),
    "experiments.configs": ("experiments.settings",),
    "experiments.cluster": ("experiments.settings",),
    "experiments.records": (
        "experiments.settings",
        "experiments.cluster",
    ),
    "experiments.train": (
        "boundjax",
        "experiments.settings",
        "experiments.data",
        "experiments.models",
        "experiments.methods",
        "experiments.cluster",
        "experiments.records",
    ),
    "experiments.evaluation": (
        "boundjax",
        "experiments.settings",
        "experiments.data",
        "experiments.models",
        "experiments.methods",
        "experiments.cluster",
        "experiments.records",
        "experiments.train",
    ),
    "experiments.plots": (
        "boundjax",
        "experiments.settings",
        "experiments.data",
        "experiments.models",
        "experiments.methods",
        "experiments.records",
        "experiments.evaluation",
    ),
    "experiments.connectivity": (
        "boundjax",
        "experiments.settings",
        "experiments.data",
        "experiments.methods",
        "experiments.records",
        "experiments.train",
        "experiments.evaluation",
        "experiments.plots",
    ),
    "experiments.run": (
        "experiments.settings",
        "experiments.cluster",
        "experiments.records",
        "experiments.train",
        "experiments.evaluation",
        "experiments.plots",
    ),
    "experiments.published": (
        "experiments.settings",
        "experiments.records",
        "experiments.evaluation",
        "experiments.run",
    ),
    "experiments.benchmarks": (
        "boundjax",
        "experiments.settings",
        "experiments.data",
        "experiments.models",
        "experiments.methods",
        "experiments.cluster",
        "experiments.train",
        "experiments.evaluation",
    ),
    "experiments": (
        "boundjax.cache",
        "experiments.settings",
        "experiments.cluster",
        "experiments.records",
        "experiments.evaluation",
        "experiments.connectivity",
        "experiments.run",
        "experiments.published",
    ),
    "launch": (
        "experiments.settings",
        "experiments",
    ),
}
# No file of these packages may import another in a circle.
WITHOUT_CIRCLES = ("boundjax", "experiments", "launch")


def inside(name, of):
    """Whether a dotted name is `of`, or lies in it."""
    return name == of or name.startswith(f"{of}.")


def room_of(module, rooms=ROOMS):
    """The room of a module: the longest name that covers it."""
    return max((room for room in rooms if inside(module, room)), key=len)


def modules(project, packages):
    """Dotted name -> path of every file of the packages."""
    paths = {}
    for package in packages:
        for path in (project / package).rglob("*.py"):
            parts = path.relative_to(project).with_suffix("").parts
            # A package that loads lazily imports what its stub lists.
            stub = path.with_suffix(".pyi")
            paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = (
                stub if stub.exists() else path
            )
    return paths


def imports(module, path, files):
    """The modules of `files` that a file imports, anywhere in it: the file that a name is in."""
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module.split(".")
                package = package[: len(package) - node.level + (path.stem == "__init__")]
                base = ".".join([*package, *([base] if base else [])])
            names = {f"{base}.{alias.name}" for alias in node.names}
            imported |= {name if name in files else base for name in names}
    return {name for name in imported if name in files and name != module}


@pytest.fixture(scope="module")
def graph(project):
    files = modules(project, {room.partition(".")[0] for room in ROOMS})
    return {module: imports(module, path, files) for module, path in files.items()}


def arrows(graph, rooms):
    """Every import from one room to another, as (room, room) -> the files that do it."""
    crossings = {}
    for module, imported in graph.items():
        for name in imported:
            source, target = room_of(module, rooms), room_of(name, rooms)
            if source != target:
                crossings.setdefault((source, target), []).append(f"{module} imports {name}")
    return crossings


def wrong_arrows(graph, rooms):
    """The imports that a table of rooms does not allow, and what it allows that nothing uses."""
    crossings = arrows(graph, rooms)
    wrong = [
        line
        for (source, target), lines in crossings.items()
        if not any(inside(target, allowed) for allowed in rooms[source])
        for line in lines
    ]
    unused = [
        f"{source} does not import {allowed}"
        for source, every in rooms.items()
        for allowed in every
        if not any(s == source and inside(target, allowed) for s, target in crossings)
    ]
    return sorted(wrong + unused)


def circles(graph):
    """The groups of modules that import one another, directly or through others."""

    def reached(start):
        seen, left = set(), [start]
        while left:
            for name in graph[left.pop()]:
                if name not in seen:
                    seen.add(name)
                    left.append(name)
        return seen

    within = {module: reached(module) for module in graph}
    groups = {
        frozenset(name for name in names if module in within[name])
        for module, names in within.items()
        if module in names
    }
    return sorted(sorted(group) for group in groups)


def test_every_room_imports_what_the_table_allows_and_nothing_else(graph):
    assert wrong_arrows(graph, ROOMS) == []


def test_a_room_stands_below_the_rooms_that_it_imports():
    rooms = list(ROOMS)
    for room, allowed in ROOMS.items():
        assert all(rooms.index(name) < rooms.index(room) for name in allowed), room


def test_no_files_import_one_another_in_a_circle(graph):
    own = {name: imported for name, imported in graph.items() if name.startswith(WITHOUT_CIRCLES)}
    own = {name: {other for other in imported if other in own} for name, imported in own.items()}
    assert circles(own) == []


def test_the_table_in_the_design_is_this_one(project):
    text = (project / "docs" / "design.md").read_text()
    (table,) = re.findall(
        r"^\| room \| what is in it \| may import \|\n\|.*\n((?:\|.*\n)+)", text, re.M
    )
    cells = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in table.splitlines()]
    shown = {room.strip("`"): tuple(re.findall(r"`([\w.]+)`", names)) for room, _, names in cells}
    assert list(shown) == list(ROOMS)
    assert shown == ROOMS


@pytest.mark.parametrize(
    "text",
    [
        "from package.upper import high",
        "import package.upper.high",
        "def late():\n    from package.upper.high import name",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from package.upper.high import T",
        "from ..upper.high import name",
        "from ..upper import high",
    ],
)
def test_an_upward_import_is_found_wherever_it_stands(tmp_path, text):
    contents = {"upper/__init__": "", "upper/high": "", "lower/__init__": "", "lower/low": text}
    for name, content in contents.items():
        path = tmp_path / "package" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    files = modules(tmp_path, ["package"])
    graph = {module: imports(module, path, files) for module, path in files.items()}
    rooms = {"package.lower": (), "package.upper": ()}
    (line,) = wrong_arrows(graph, rooms)
    assert line == "package.lower.low imports package.upper.high"
    assert wrong_arrows(graph, {**rooms, "package.lower": ("package",)}) == []
    assert wrong_arrows(
        graph, {**rooms, "package.lower": ("package",), "package.upper": ("package.lower",)}
    ) == ["package.upper does not import package.lower"]


def test_a_circle_of_files_is_found():
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": set(), "e": {"a"}}
    assert circles(graph) == [["a", "b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []
