"""The rules of the house, checked on source text: imports, layers, cycles, prints, file sizes."""

import ast
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

PACKAGES = ("strategies", "tuner", "server")
MAX_LINES = 400

# A package may import itself and what stands before it.
LAYERS = {"strategies": 0, "tuner": 1, "server": 2}
STRATEGIES_KNOW = {"strategies", "numpy", "scipy", "optuna"} | sys.stdlib_module_names


@dataclass(frozen=True)
class Import:
    """One import statement's target: `module`, and the `name` taken from it, if any."""

    module: str
    name: str | None
    line: int
    level: int
    in_function: bool

    @property
    def root(self) -> str:
        """The top-level package that is imported."""
        return self.module.partition(".")[0]


@dataclass(frozen=True)
class Module:
    """The source text of one module; `name` is dotted, a package's is that of its folder."""

    name: str
    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The parsed text."""
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> tuple[Import, ...]:
        """Every import of the module, those inside functions included."""
        return tuple(_imports(self.tree, in_function=False))

    @property
    def root(self) -> str:
        """The top-level package that the module is in."""
        return self.name.partition(".")[0]


Modules = Mapping[str, Module]


def read_modules(root: Path) -> Modules:
    """Read every module of the three packages under `root`."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found[name] = Module(name, path.read_text(encoding="utf-8"))
    return found


def from_texts(**texts: str) -> Modules:
    """Make modules of source texts; `__` in a keyword stands for a dot."""
    names = {key.replace("__", "."): text for key, text in texts.items()}
    return {name: Module(name, text) for name, text in names.items()}


def layer_breaches(modules: Modules) -> list[str]:
    """Find imports from a layer above, and what `strategies` must not import at all."""
    breaches = []
    for module, imported in _all_imports(modules):
        if LAYERS.get(imported.root, -1) > LAYERS[module.root]:
            breaches.append(f"{module.name}:{imported.line} imports {imported.module} from above")
        elif module.root == "strategies" and imported.root not in STRATEGIES_KNOW:
            breaches.append(f"{module.name}:{imported.line} must not import {imported.module}")
    return breaches


def rank_breaches(modules: Modules, ranks: Mapping[str, int]) -> list[str]:
    """Find imports inside `tuner` that go up, and modules that have no rank.

    A rank holds for a module or package and all that is in it.
    """
    breaches = [
        f"{name} has no rank: give it one"
        for name in modules
        if name.startswith("tuner.") and _rank(name, ranks) is None
    ]
    for module, target, line in _inner_imports(modules):
        ours, theirs = _rank(module, ranks), _rank(target, ranks)
        if ours is not None and theirs is not None and theirs > ours:
            breaches.append(f"{module}:{line} imports {target} of a higher rank")
    return breaches


def forbidden_imports(modules: Modules, forbidden: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Find imports of a module (with all that is in it) that another names as forbidden."""
    return [
        f"{module.name}:{imported.line} must not import {target}"
        for module, imported in _all_imports(modules)
        for place, targets in forbidden.items()
        for target in targets
        if _is_in(module.name, place) and _is_in(_target(imported, modules), target)
    ]


def cycles(modules: Modules) -> list[str]:
    """Find groups of modules that import each other at module level.

    To import `a.b.c` runs the `__init__` of `a` and of `a.b` first, so they count as imported,
    save those that the importing module is itself in, which run already.
    """
    edges: dict[str, set[str]] = {name: set() for name in modules}
    for module, imported in _all_imports(modules):
        if imported.in_function:
            continue
        for target in _prefixes(_target(imported, modules)):
            if target in modules and not _is_in(module.name, target):
                edges[module.name].add(target)
        if _target(imported, modules) in modules:
            edges[module.name].add(_target(imported, modules))
    reached = {name: _reachable(name, edges) for name in modules}
    groups = {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in modules
        if name in reached[name]
    }
    return sorted(" ↔ ".join(sorted(group)) for group in groups)


def relative_and_star_imports(modules: Modules) -> list[str]:
    """Find `from .x import y` and `from x import *`."""
    return [
        f"{module.name}:{imported.line} has a relative or star import"
        for module, imported in _all_imports(modules)
        if imported.level or imported.name == "*"
    ]


def hidden_imports(modules: Modules) -> list[str]:
    """Find imports inside functions without a comment that names the optional package."""
    found = []
    for module, imported in _all_imports(modules):
        comment = module.text.splitlines()[imported.line - 1].partition("#")[2]
        is_excused = imported.root in comment and imported.root not in PACKAGES
        if imported.in_function and not is_excused:
            found.append(f"{module.name}:{imported.line} hides an import of {imported.module}")
    return found


def prints(modules: Modules, allowed: tuple[str, ...]) -> list[str]:
    """Find calls of `print` outside the `allowed` modules."""
    return [
        f"{module.name}:{node.lineno} prints"
        for module in modules.values()
        if module.name not in allowed
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def long_files(line_counts: Mapping[str, int], excused: Mapping[str, str]) -> list[str]:
    """Find files over 400 lines without an excuse, and excuses that are no longer needed."""
    long = {name for name, count in line_counts.items() if count > MAX_LINES}
    return [
        *(f"{name} has {line_counts[name]} lines" for name in sorted(long - excused.keys())),
        *(f"{name} needs no excuse" for name in sorted(excused.keys() - long)),
    ]


def _imports(node: ast.AST, in_function: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, None, child.lineno, 0, in_function)
        elif isinstance(child, ast.ImportFrom):
            for alias in child.names:
                yield Import(child.module or "", alias.name, child.lineno, child.level, in_function)
        is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from _imports(child, in_function or is_function)


def _all_imports(modules: Modules) -> Iterator[tuple[Module, Import]]:
    for module in modules.values():
        for imported in module.imports:
            yield module, imported


def _inner_imports(modules: Modules) -> Iterator[tuple[str, str, int]]:
    for module, imported in _all_imports(modules):
        if module.root == "tuner" and imported.root == "tuner":
            yield module.name, _target(imported, modules), imported.line


def _target(imported: Import, modules: Modules) -> str:
    """Return the module that is imported: `from a import b` means a.b where that is a module."""
    inner = f"{imported.module}.{imported.name}"
    return inner if inner in modules else imported.module


def _prefixes(name: str) -> Iterator[str]:
    parts = name.split(".")
    return (".".join(parts[:count]) for count in range(1, len(parts) + 1))


def _is_in(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def _rank(name: str, ranks: Mapping[str, int]) -> int | None:
    known = [ranks[prefix] for prefix in _prefixes(name) if prefix in ranks]
    return known[-1] if known else None


def _reachable(start: str, edges: Mapping[str, set[str]]) -> set[str]:
    seen: set[str] = set()
    todo = list(edges[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo.extend(edges[name])
    return seen
