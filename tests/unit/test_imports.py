"""The shape of the source: which room imports which, what importing loads, and how large a folder, file or function is."""

import ast
import subprocess
import sys
from collections import Counter
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import dpo_plugin

SOURCE = Path(dpo_plugin.__file__).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

FLOORS = [
    {"types", "errors", "plain_text", "validation", "config"},
    {"data"},
    {"health"},
    {"model"},
    {"engines"},
    {"compute"},
    {"metrics"},
    {"samples"},
    {"hookspecs"},
    {"report"},
    {"registry", "builtins"},
    {"plan"},
    {"host"},
    {"__init__", "__main__"},
]
"""Rooms, lowest first; a module imports from its own floor and from those below. `CONTRIBUTING.md` has the same order."""

LONGEST_FUNCTION, LONGEST_FILE, LARGEST_FOLDER = 40, 300, 12


def module_of(file: Path) -> str:
    """The dotted name in the package; the package itself is ``__init__``."""
    parts = file.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {module_of(file) for file in FILES}


def imported(tree: ast.Module) -> set[str]:
    """Every name after ``import`` or ``from``, also in functions and under ``TYPE_CHECKING``, ``a.b.c`` with its object."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import does not say which room it is from"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def our_modules(tree: ast.Module) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for name in imported(tree):
        package, *rest = name.split(".")
        if package == "dpo_plugin":
            paths = [".".join(rest[:length]) for length in range(len(rest), 0, -1)]
            found.add(next((path for path in paths if path in MODULES), "__init__"))
    return found


def floor_of(module: str) -> int:
    return next(number for number, rooms in enumerate(FLOORS) if module.partition(".")[0] in rooms)


def test_every_room_has_a_floor():
    assert {module.partition(".")[0] for module in MODULES} == set().union(*FLOORS)


def test_imports_run_down_only():
    upward = [
        f"{module_of(file)} imports {other}"
        for file, tree in TREES.items()
        for other in sorted(our_modules(tree))
        if floor_of(other) > floor_of(module_of(file))
    ]
    assert not upward


def test_no_modules_import_each_other_in_a_circle():
    graph = {module_of(file): our_modules(tree) - {module_of(file)} for file, tree in TREES.items()}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" → ".join(error.args[1]))


def test_only_the_host_imports_axolotl_and_trl():
    foreign = {
        f"{module_of(file)} imports {name}"
        for file, tree in TREES.items()
        for name in sorted(imported(tree))
        if name.partition(".")[0] in ("axolotl", "trl") and module_of(file).partition(".")[0] != "host"
    }
    assert not foreign


def test_a_folder_can_be_taken_in_at_a_glance():
    sizes = Counter(file.parent.relative_to(SOURCE) for file in FILES)
    large = {str(folder): size for folder, size in sizes.items() if size > LARGEST_FOLDER}
    assert not large


def test_a_file_can_be_read_in_one_sitting():
    lengths = {str(file.relative_to(SOURCE)): len(file.read_text(encoding="utf-8").splitlines()) for file in FILES}
    long = {file: length for file, length in lengths.items() if length > LONGEST_FILE}
    assert not long


def lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first, whole = function.body[0], function.end_lineno - function.lineno + 1
    return whole - (first.end_lineno - first.lineno + 1) if ast.get_docstring(function) is not None else whole


def test_a_function_fits_on_a_screen():
    functions = [
        (f"{module_of(file)}.{node.name}", lines_without_docstring(node))
        for file, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {function: lines for function, lines in functions if lines > LONGEST_FUNCTION}
    assert not long


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_package_loads_neither_torch_nor_axolotl():
    assert not loaded_by("import dpo_plugin") & {"torch", "axolotl", "transformers", "trl", "peft"}


def test_registry_loads_neither_axolotl_nor_trl():
    assert not loaded_by("from dpo_plugin.registry import get_registry; get_registry()") & {"axolotl", "trl"}


def test_an_import_error_of_the_plugin_is_not_swallowed_by_the_host(monkeypatch: pytest.MonkeyPatch):
    from dpo_plugin.errors import DPOPluginError

    monkeypatch.setitem(dpo_plugin._LAZY, "Missing", "dpo_plugin.no_such_module")
    with pytest.raises(DPOPluginError, match="pip install"):
        dpo_plugin.Missing  # noqa: B018
