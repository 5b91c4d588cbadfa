"""How the house is laid out: which way imports point, what is private to whom, how long a file may be.

Read from the source by its syntax tree, so that an import within a function counts as well.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = "ats_kernels", "ats"
BESIDE = "tests", "bench", "tools", "examples"

# From below to above; a module may import of its own level and of those below it. The longest name that fits counts.
LEVELS = (
    ("ats_kernels",),
    ("ats.version", "ats._files", "ats._renamed", "ats._modules", "ats.paths"),
    (
        "ats.grid",
        "ats.batches",
        "ats.reading",
        "ats.receptive_field",
        "ats.probe",
        "ats.dependence",
        "ats.samples",
        "ats.cells",
        "ats.pooling",
        "ats.functional",
        "ats.overlap",
        "ats.datasets",
        "ats.sources",
        "ats.regions",
    ),
    (
        "ats.nn",
        "ats.layers",
        "ats.draw_options",
        "ats.nested",
        "ats.nested_levels",
        "ats.nested_sample",
        "ats.ground",
        "ats.zoom",
    ),
    (
        "ats.prediction",
        "ats.class_logits",
        "ats.nested_variance",
        "ats.nested_maps",
        "ats.draw_plan",
        "ats.nested_inference",
        "ats.inference",
        "ats.diagnostics",
        "ats.export",
        "ats.heatmaps",
        "ats",
    ),
    ("ats.models",),
    ("ats.experiments",),
    ("ats.experiments.commands",),
    ("ats.cli", "ats.__main__"),
)
LAZY = {("ats", "ats.experiments.trained")}
"""What reaches up, within a function: `ats.load` gives a trained run to whoever has the extra."""


@dataclass(frozen=True)
class Import:
    """One module that another imports, with the name that it takes of it, if any."""

    importer: str
    module: str
    name: str | None
    line: int
    late: bool  # within a function, or for type checkers only

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.module}{f' ({self.name})' if self.name else ''}"


def modules_of(*tops: str) -> dict[str, Path]:
    found = {}
    for top in tops:
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@lru_cache
def shipped() -> dict[str, Path]:
    return modules_of(*SHIPPED)


@lru_cache
def imports() -> tuple[Import, ...]:
    return tuple(found for module, path in shipped().items() for found in imports_of(module, path.read_text()))


def imports_of(importer: str, source: str) -> Iterator[Import]:
    def walk(node: ast.AST, late: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inner = late or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                inner = True
            if isinstance(child, ast.Import):
                yield from (Import(importer, alias.name, None, child.lineno, late) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{importer}:{child.lineno}: a relative import"
                for alias in child.names:
                    inside = f"{child.module}.{alias.name}"
                    if inside in shipped():
                        yield Import(importer, inside, None, child.lineno, late)
                    else:
                        yield Import(importer, str(child.module), alias.name, child.lineno, late)
            else:
                yield from walk(child, inner)

    yield from walk(ast.parse(source), False)


def level_of(module: str) -> int:
    fitting = [
        (len(name), number)
        for number, names in enumerate(LEVELS)
        for name in names
        if module == name or (module.startswith(f"{name}.") and name != "ats")
    ]
    assert fitting, f"{module} is on no level: say in tests/test_layout.py where it belongs"
    return max(fitting)[1]


def private_to(found: Import) -> str | None:
    """The package within which the first private part of what is imported may be used."""
    parts = [*found.module.split("."), *([found.name] if found.name else [])]
    for count, part in enumerate(parts):
        if part.startswith("_") and not part.startswith("__"):
            owner = ".".join(parts[:count])
            path = shipped().get(owner)
            return owner if path is None or path.name == "__init__.py" else owner.rpartition(".")[0]
    return None


def ours(module: str) -> bool:
    return module.partition(".")[0] in SHIPPED


def test_imports_point_downwards() -> None:
    up = [
        str(found)
        for found in imports()
        if ours(found.module)
        and level_of(found.module) > level_of(found.importer)
        and not (found.late and (found.importer, found.module) in LAZY)
    ]
    assert not up


def test_data_sets_and_sources_know_nothing_of_models() -> None:
    """Nor of modules that draw: whoever only reads images must not need them."""
    for found in imports():
        if found.importer.startswith(("ats.datasets", "ats.sources")) and ours(found.module):
            assert level_of(found.module) <= level_of("ats.grid"), str(found)


def test_only_the_registry_knows_which_experiments_there_are() -> None:
    """What asks which experiment it has would have to import one."""
    experiments = [f"ats.experiments.{name}" for name in ("megapixel_mnist", "colon_cancer", "speed_limits", "images")]
    for found in imports():
        if found.module in experiments:
            assert found.importer == "ats.experiments.registry", str(found)


def test_what_is_shipped_imports_nothing_that_is_not() -> None:
    for found in imports():
        assert found.module.partition(".")[0] not in BESIDE, str(found)


def test_private_names_stay_in_their_package() -> None:
    for found in imports():
        owner = private_to(found) if ours(found.module) else None
        assert owner is None or f"{found.importer}.".startswith(f"{owner}."), str(found)


def test_no_import_goes_in_a_circle() -> None:
    """Nor does one within a function, which hides a circle and does not undo it; nor one for type checkers."""
    graph: dict[str, set[str]] = {module: set() for module in shipped()}
    for found in imports():
        lazy = found.late and (found.importer, found.module) in LAZY
        if found.module in graph and not lazy and found.module != found.importer:
            graph[found.importer].add(found.module)
    done: set[str] = set()

    def visit(module: str, path: list[str]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*path, module])
            done.add(module)

    for module in graph:
        visit(module, [])


def test_no_file_is_longer_than_350_lines() -> None:
    lengths = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for path in modules_of(*SHIPPED, *BESIDE).values()
    }
    assert not {name: lines for name, lines in lengths.items() if lines > 350}


@pytest.mark.parametrize(
    ("source", "module", "name", "late"),
    [
        ("import ats.nn", "ats.nn", None, False),
        ("from ats import nn", "ats.nn", None, False),
        ("from ats.nn import AttentionSampling", "ats.nn", "AttentionSampling", False),
        ("def f():\n    from ats import nn", "ats.nn", None, True),
        ("if TYPE_CHECKING:\n    import ats.nn", "ats.nn", None, True),
        ("try:\n    import ats.nn\nexcept ImportError:\n    pass", "ats.nn", None, False),
    ],
)
def test_imports_are_found_wherever_they_stand(source: str, module: str, name: str | None, late: bool) -> None:
    """The tests above would pass if nothing was found."""
    (found,) = imports_of("ats.grid", source)
    assert (found.module, found.name, found.late) == (module, name, late)
    assert level_of("ats.grid") < level_of(module)
    assert level_of("ats.datasets.mnist") < level_of("ats.models.mil") < level_of("ats.experiments.cost")


def test_what_is_private_is_told() -> None:
    def owner(source: str) -> str | None:
        return private_to(next(imports_of("ats.models.mil", source)))

    assert owner("from ats.nn import _check") == "ats"
    assert owner("from ats_kernels.pooling.op import _weights") == "ats_kernels.pooling"
    assert owner("import ats._files") == "ats"
    assert owner("from ats.nn import __doc__") is None
    assert len(imports()) > 300
