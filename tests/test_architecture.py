"""The rooms of the package, and which way they may look.

The package docstring draws the map; here it is held. Imports are read from the
source, those for types only included: a name that is only a type is knowledge
of the other room too.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import dicomproxy

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "dicomproxy"
LONGEST_MODULE_LINES = 600
LONGER_MODULES = {"dicomproxy.dataset.identifier": 620}
"""One that has outgrown it: to be divided, and not to be joined by others."""

BASE = {"logs", "tasks"}
CORE = BASE | {"dataset", "ports"}
COMPOSITION = {"app", "wiring", "wiring_hl7", "wiring_identity", "snapshot"}
INNER = {"hl7", "identity", "query", "retrieval"}
EDGES = {"audit", "cache", "destinations", "services", "sources", "state", "web"}

MAY_IMPORT: dict[str, set[str]] = {
    "logs": set(),
    "tasks": {"logs"},
    "dataset": set(),
    "ports": {"dataset"},
    "dimse": BASE,
    "query": CORE | {"identity"},
    "retrieval": CORE | {"identity"},
    "sources": CORE | {"dimse"},
    "destinations": CORE | {"dimse"},
    "services": CORE | {"dimse", "query", "retrieval"},
    "cache": CORE,
    "state": CORE,
    "audit": CORE,
    "web": CORE | {"query", "retrieval"},
    "hl7": BASE,
    "identity": CORE | {"hl7"},
    "config": {"dataset"},
    "demo": set(),
    **dict.fromkeys(COMPOSITION, CORE | EDGES | COMPOSITION | {"config", "dimse"} | INNER),
    "cli": CORE | EDGES | COMPOSITION | {"config", "dimse", "demo"} | INNER,
    "__main__": {"cli"},
    "__init__": set(),
}
"""For each room the others it may import from; itself always."""

HOMES: dict[str, set[str]] = {
    "aiohttp": {"identity", "web"},
    "diskcache": {"cache"},
    "hl7kit": {"hl7"},
    "isal": {"cache"},
    "numpy": set(),
    "prometheus_client": BASE | EDGES | INNER | {"dimse"},
    "pydantic": {"config"},
    "pydantic_core": {"config"},
    "pydicom": {"dataset", "destinations", "demo", "cli"},
    "pynetdicom": {"dimse", "services", "sources", "demo"},
    "rich": {"cli"},
    "sqlite3": {"cache", "identity", "state"},
    "structlog": {"logs"},
    "uvloop": {"app"},
    "yaml": {"config"},
}
"""For each foreign package, and for SQLite, the rooms that may import it."""

REGISTRIES = {"pynetdicom.presentation", "pynetdicom.sop_class", "pynetdicom.status"}
"""What the proxy takes of pynetdicom: tables, and nothing that talks."""

SANS_IO = {
    "dicomproxy.dimse.command",
    "dicomproxy.dimse.errors",
    "dicomproxy.dimse.framing",
    "dicomproxy.dimse.machine",
    "dicomproxy.dimse.negotiation",
    "dicomproxy.dimse.pdu",
    "dicomproxy.identity.coercion",
    "dicomproxy.identity.coercion_patient",
    "dicomproxy.identity.coercion_record",
    "dicomproxy.identity.coercion_request",
    "dicomproxy.identity.coercion_rules",
    "dicomproxy.identity.coercion_values",
    "dicomproxy.identity.domains",
    "dicomproxy.identity.safety",
    "dicomproxy.identity.same",
    "dicomproxy.hl7.charset",
    "dicomproxy.hl7.errors",
    "dicomproxy.hl7.framing",
    "dicomproxy.hl7.message",
    "dicomproxy.hl7.writing",
    "dicomproxy.identity.cx",
    "dicomproxy.query.match",
    "dicomproxy.query.merge",
    "dicomproxy.query.plan",
    "dicomproxy.query.rows",
    "dicomproxy.retrieval.batches",
    "dicomproxy.retrieval.request",
    "dicomproxy.retrieval.selection",
    "dicomproxy.retrieval.tally",
}
INPUT_OUTPUT = {"asyncio", "os", "pathlib", "socket", "sqlite3", "ssl", "subprocess", "threading"}


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 2 else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room(module: str) -> str:
    """Return the room of a module of ours; ``__init__`` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path) -> Iterator[tuple[str, int]]:
    """Yield each module that *path* imports, resolved as far as can be seen, with its line."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: relative import"
            for alias in node.names:
                # ``from dicomproxy import logs`` names a module, ``__version__`` does not.
                inner = f"{node.module}.{alias.name}"
                yield (
                    (inner if inner in MODULES or inner in REGISTRIES else node.module or ""),
                    node.lineno,
                )


def runtime_imports(path: Path) -> set[str]:
    """Return our modules that *path* imports when it is itself imported."""

    class Visitor(ast.NodeVisitor):
        def __init__(self) -> None:
            self.found: set[str] = set()

        def visit_If(self, node: ast.If) -> None:
            if ast.unparse(node.test) not in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
                self.generic_visit(node)

        def skip(self, _node: ast.AST) -> None:
            """Leave out what is imported only when a function is called."""

        visit_FunctionDef = visit_AsyncFunctionDef = skip  # noqa: N815  (named by ast)

        def visit_Import(self, node: ast.Import) -> None:
            self.found.update(alias.name for alias in node.names)

        def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                self.found.add(inner if inner in MODULES else node.module or "")

    visitor = Visitor()
    visitor.visit(tree(path))
    return {name for name in visitor.found if name in MODULES}


EVERY_MODULE = pytest.mark.parametrize("module", MODULES)


def test_every_room_has_its_rule_and_its_place_on_the_map() -> None:
    """A new room is given its direction here and a line in the package docstring."""
    assert {room(module) for module in MODULES} == set(MAY_IMPORT)
    folders = {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()}
    drawn = set(re.findall(r"^ +([a-z0-9]+)/ ", dicomproxy.__doc__ or "", re.MULTILINE))
    assert drawn == folders


def test_edges_are_strangers_to_one_another() -> None:
    """The table of directions itself lets no edge import another."""
    for edge in EDGES:
        assert not MAY_IMPORT[edge] & (EDGES - {edge})


@EVERY_MODULE
def test_imports_go_downwards_only(module: str) -> None:
    """A module imports from its own room and from those below it."""
    here = room(module)
    for name, line in imports(MODULES[module]):
        # The package itself holds the version, which anyone may name.
        if name.split(".")[0] == "dicomproxy" and name != "dicomproxy":
            allowed = MAY_IMPORT[here] | {here}
            assert room(name) in allowed, f"{module}:{line}: {here} imports {name}"


@EVERY_MODULE
def test_foreign_packages_stay_in_their_rooms(module: str) -> None:
    """Each foreign package is imported where it is at home; an unknown one nowhere."""
    here = room(module)
    for name, line in imports(MODULES[module]):
        package = name.split(".")[0]
        if package in HOMES:
            assert here in HOMES[package], f"{module}:{line}: {here} imports {name}"
        else:
            known = package == "dicomproxy" or package in sys.stdlib_module_names
            assert known, f"{module}:{line}: {name} has no home"


@EVERY_MODULE
def test_only_registries_are_taken_of_pynetdicom(module: str) -> None:
    """Outside the demo nothing of pynetdicom is used that opens a socket or starts a thread."""
    if room(module) == "demo":
        return
    used = {name for name, _ in imports(MODULES[module]) if name.startswith("pynetdicom")}
    assert used <= REGISTRIES


@pytest.mark.parametrize("module", sorted(SANS_IO))
def test_pure_modules_do_no_io(module: str) -> None:
    """Protocol and rules are values in, values out: no loop, file, thread or socket."""
    assert module in MODULES
    used = {name.split(".")[0] for name, _ in imports(MODULES[module])}
    assert not used & INPUT_OUTPUT


def test_dataset_room_is_pure() -> None:
    """No module about data sets does input or output."""
    for module, path in MODULES.items():
        if room(module) == "dataset":
            used = {name.split(".")[0] for name, _ in imports(path)}
            assert not used & INPUT_OUTPUT, module


def test_no_import_cycle() -> None:
    """Modules can be put into an order in which each is imported after those it needs."""
    needs = {module: runtime_imports(path) - {module} for module, path in MODULES.items()}
    while ready := [module for module, wanted in needs.items() if not wanted & needs.keys()]:
        for module in ready:
            del needs[module]
    assert sorted(needs) == []


@EVERY_MODULE
def test_tasks_have_owners(module: str) -> None:
    """Nothing starts a task except the one module that names and owns them, and TaskGroups."""
    if module == "dicomproxy.tasks":
        return
    for node in ast.walk(tree(MODULES[module])):
        if not isinstance(node, ast.Attribute):
            continue
        owner = ast.unparse(node.value)
        loose = node.attr in ("ensure_future", "wait_for") and owner == "asyncio"
        if node.attr == "create_task":
            loose = owner == "asyncio" or "loop" in owner
        assert not loose, f"{module}:{node.lineno}: {owner}.{node.attr}"


@EVERY_MODULE
def test_module_says_what_it_is_for_and_is_not_too_long(module: str) -> None:
    """Every module opens with its purpose, and fits into a head."""
    path = MODULES[module]
    assert ast.get_docstring(tree(path)), module
    lines = len(path.read_text("utf-8").splitlines())
    assert lines <= LONGER_MODULES.get(module, LONGEST_MODULE_LINES), f"{module}: {lines} lines"


# ---------------------------------------------------------------- tracked files

FORBIDDEN = {
    "a path of somebody's machine": re.compile(r"(?<![\w.])/(?:root|home|work|opt|Users)/[\w.]"),
    "the address of a package index": re.compile(
        r"\b(?:pypi\.|[\w.]*pythonhosted\.)\w+", re.IGNORECASE
    ),
    "a numbered decision instead of its reason": re.compile(r"\(D\d{1,2}\b|\bD\d{1,2}(?:'s\b|\))"),
}


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False, timeout=30
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    names = listed.stdout.decode().split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def test_tracked_files_speak_of_the_project_alone() -> None:
    """No tracked text names a machine's path, a package index or a decision by number."""
    found = []
    for path in tracked_files():
        if path == Path(__file__):
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue  # not a text
        for number, line in enumerate(text.splitlines(), 1):
            found += [
                f"{path.relative_to(ROOT)}:{number}: {what}"
                for what, pattern in FORBIDDEN.items()
                if pattern.search(line)
            ]
    assert found == []


LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def test_links_between_pages_lead_somewhere() -> None:
    """Every relative link of the pages names a file, and a heading of it if it names one."""
    broken = []
    pages = [path for path in tracked_files() if path.suffix == ".md"]
    assert ROOT / "README.md" in pages
    for page in pages:
        text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in LINK.findall(text):
            if re.match(r"[a-z]+:", target):
                continue
            name, _, anchor = target.partition("#")
            path = (page.parent / name).resolve() if name else page
            if not path.exists() or (anchor and anchor not in anchors(path)):
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert broken == []


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as they are made of their text."""
    headings = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
