"""The architecture, enforced: imports go one way, nothing is large or unexplained."""

import ast
import graphlib
import pathlib
import re

import pytest

from mtp_jax.config import Config, as_tree

# From the top down: a folder imports only from those after it. Last come the files of
# the package itself. `__init__` (the public names, lazily) and `__main__` (the program)
# are above all.
FOLDERS = [
    "cli",
    "reports",
    "studies",
    "run",
    "growth",
    "exporting",
    "verification",
    "eval",
    "decode",
    "interop",
    "planning",
    "checkpoint",
    "training",
    "loss",
    "model",
    "parallel",
    "rehearsal",
    "data",
    "distributed",
    "config",
    "sandbox",
    "storage",
    "errors",
]
ABOVE_ALL = {"", "__main__"}
ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "mtp_jax"
NO_BEGINNING = re.compile(r"(What|Of|The same|See)\b")


def modules_of(package):
    """Path of each module by its dotted name; `decode.decoders` is an __init__.py."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(modules, name):
    """Modules of the package that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(modules[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    dotted = {x.removeprefix("mtp_jax.") for x in found if x.startswith("mtp_jax.")}
    # `from a.b import c` is an import of a.b, or of the module a.b.c if there is one.
    return {x if x in modules else x.rpartition(".")[0] for x in dotted} - {""}


def upward_imports(package):
    """Imports of a folder from itself upwards, as `decode.cache -> run.loop`."""
    modules = modules_of(package)
    rank = {folder: i for i, folder in enumerate(FOLDERS)}
    return [
        f"{name} -> {other}"
        for name in sorted(modules.keys() - ABOVE_ALL)
        for other in sorted(imports_of(modules, name))
        if rank[other.split(".")[0]] < rank[name.split(".")[0]]
    ]


def circle_in(package):
    """Modules that import each other in a circle; None if there are none."""
    modules = modules_of(package)
    graph = {name: imports_of(modules, name) - {name} for name in modules}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return None


def planted(tmp_path, **texts):
    """A package of a few modules, `decode__cache="..."` being decode/cache.py."""
    for name, text in texts.items():
        path = tmp_path / (name.replace("__", "/") + ".py")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


MODULES = modules_of(PACKAGE)


def test_folders_import_one_way():
    assert upward_imports(PACKAGE) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle_in(PACKAGE) is None


def test_an_upward_import_is_found(tmp_path):
    package = planted(
        tmp_path,
        model__layers="def f():\n    from mtp_jax.decode import cache\n",
        decode__cache="from mtp_jax.errors import UserError\n",
        errors="",
    )

    assert upward_imports(package) == ["model.layers -> decode.cache"]


def test_a_circle_is_found(tmp_path):
    package = planted(
        tmp_path,
        decode__a="from mtp_jax.decode.b import x\n",
        decode__b="import mtp_jax.decode.c\n",
        decode__c="from mtp_jax.decode import a\n",
    )

    assert {"decode.a", "decode.b", "decode.c"} <= set(circle_in(package))


def test_the_list_names_every_folder_once():
    there = {name.split(".")[0] for name in MODULES} - ABOVE_ALL

    assert len(set(FOLDERS)) == len(FOLDERS)
    assert set(FOLDERS) == there


def test_the_document_has_the_same_list():
    rows = re.findall(
        r"^\| `(\w+)(?:/|\.py)` \|", (ROOT / "ARCHITECTURE.md").read_text(), re.M
    )

    assert rows == FOLDERS


def test_the_package_itself_holds_what_all_folders_share():
    """Config is a folder of its own; everything else has a room."""
    files = {path.name for path in PACKAGE.iterdir() if path.is_file()}

    allowed = {"__init__.py", "__main__.py", "storage.py", "errors.py", "py.typed"}
    assert files <= allowed


def test_no_folder_has_the_name_of_a_public_function():
    """`from mtp_jax import train` would give the one or the other."""
    import mtp_jax

    assert not set(mtp_jax.__all__) & set(FOLDERS)


def test_every_folder_says_what_it_is():
    for folder in {path.parent for path in MODULES.values()}:
        assert ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))


@pytest.mark.parametrize(
    "path",
    [*MODULES.values(), *ROOT.glob("*/*.py"), *ROOT.glob("integrations/**/*.py")],
    ids=str,
)
def test_files_and_functions_are_short(path):
    text = path.read_text()

    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 > 80
    ]

    assert len(text.splitlines()) <= 400
    assert not long


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_what_they_offer_have_docstrings(name):
    tree = ast.parse(MODULES[name].read_text())

    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    offered = [
        node
        for node in tree.body
        if isinstance(node, kinds) and not node.name.startswith("_")
    ]
    without = [node.name for node in offered if not ast.get_docstring(node)]
    assert ast.get_docstring(tree)
    assert not without


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_stand_alone(name):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module
    docs = [
        ast.get_docstring(node) or ""
        for node in ast.walk(ast.parse(MODULES[name].read_text()))
        if isinstance(node, kinds)
    ]

    assert not [doc for doc in docs if NO_BEGINNING.match(doc)]


def test_the_training_spine_knows_arrays_only():
    for name in MODULES:
        if name.split(".")[0] in ("model", "loss", "training", "parallel"):
            assert not [x for x in imports_of(MODULES, name) if x.startswith("decode")]


def names_read(tree):
    """Attributes that are read in some code, and other names."""
    loads = [x for x in ast.walk(tree) if isinstance(getattr(x, "ctx", None), ast.Load)]
    attributes = {x.attr for x in loads if isinstance(x, ast.Attribute)}
    return attributes, {x.id for x in loads if isinstance(x, ast.Name)}


def test_every_field_of_the_config_is_read():
    """By others than the config, or by a function of the config that they call."""
    read, called, of_config = set(), set(), []
    for name, path in MODULES.items():
        tree = ast.parse(path.read_text())
        if name.startswith("config"):
            of_config += [x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)]
        else:
            attributes, names = names_read(tree)
            read |= attributes
            called |= attributes | names
    reached = True
    while reached:
        reached = [x for x in of_config if x.name in called]
        of_config = [x for x in of_config if x.name not in called]
        for function in reached:
            attributes, names = names_read(function)
            read |= attributes
            called |= attributes | names

    for section, fields in as_tree(Config()).items():
        if section != "mesh":  # whose axes are read all at once
            assert fields.keys() <= read, (section, fields.keys() - read)
