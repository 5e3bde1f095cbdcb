"""The architecture, enforced: imports go one way, nothing is large or unexplained."""

import ast
import dataclasses
import pathlib
import re

import pytest

from mtp_jax.config import Config

# A module imports only from the sets above its own.
LAYERS = [
    {"errors", "last_step", "goodput"},
    {"config", "tokenizer", "documents", "zigzag", "place", "stores", "hub"}
    | {"native"},
    {"watch"},
    {"hosts"},
    {"cli_args", "text_stream", "sharding", "flops", "corpus", "kernels", "program"}
    | {"rehearse_hosts", "rehearse_scale", "panels"},
    {"cooccurrence"},
    {"tokenizing", "shard_writer", "packing", "layers", "attention", "rehearse_storm"},
    {"data", "feed", "model", "rehearse_faults"},
    {"heads", "decode_model", "cross_entropy"},
    {"head_loss", "cache"},
    {"losses", "optim", "decoders.sampling", "decoders.token_tree"},
    {"decoders.state", "decoders.ngrams", "decoders.beam_search"},
    {"decoders.passes"},
    {"decoders.plain", "decoders.blockwise", "decoders.speculative", "decoders.tree"},
    {"decoders.typical", "decoders.dynamo", "decoders.dynamo_exact", "decoders.beam"},
    {"decoders"},
    {"train_step", "adaptive"},
    {"checkpoint", "decode_program", "ahead"},
    {"decode_batch", "restore", "run_log"},
    {"records", "run_file", "local_checkpoints", "generation", "enumerate_law"},
    {"decode"},
    {"token_view", "decoder_args", "prompts", "jsonl_output", "compare"},
    {"verify_greedy", "verify_law"},
    {"evaluate", "generate", "verify", "prepare", "count", "audit", "plan"},
    {"loop", "calibrate", "rehearse"},
    {"train"},
    {"__main__"},
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / "mtp_jax"


def name_of(path):
    """`decoders.plain` of mtp_jax/decoders/plain.py, `decoders` of its __init__.py."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(name):
    """Modules of the package that a module imports, anywhere in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    dotted = {x.removeprefix("mtp_jax.") for x in found if x.startswith("mtp_jax.")}
    # `from a.b import c` is an import of a.b, or of the module a.b.c if there is one.
    return {x if x in MODULES else x.rpartition(".")[0] for x in dotted} - {""}


@pytest.mark.parametrize("name", [name for name in MODULES if name])
def test_a_module_imports_only_from_the_layers_above_it(name):
    wrong = {x for x in imports_of(name) if RANK[x] >= RANK[name]}

    assert not wrong, f"{name} (layer {RANK[name]}) may not import {wrong}"


def test_the_table_of_layers_names_every_module_once():
    assert sum(map(len, LAYERS)) == len(RANK)
    assert set(RANK) == set(MODULES) - {""}


def test_imports_go_the_way_that_the_document_says():
    rank = {}
    for line in (ROOT / "ARCHITECTURE.md").read_text().splitlines():
        if row := re.match(r"\| (\d+) \| (.+?) \|", line):
            names = re.findall(r"`(\w+)/?`", row[2])
            rank |= {name: int(row[1]) for name in names}

    tops = {name: name.split(".")[0] for name in set(MODULES) - {""}}
    assert set(rank) == set(tops.values())
    for name, top in tops.items():
        outside = {tops[x] for x in imports_of(name)} - {top}
        wrong = {x for x in outside if rank[x] >= rank[top]}
        assert not wrong, f"{name} imports {wrong}"


def test_the_package_itself_imports_nothing():
    assert not imports_of("")


@pytest.mark.parametrize("name", MODULES)
def test_modules_and_functions_are_short(name):
    text = MODULES[name].read_text()

    long = [
        node.name
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno - node.lineno + 1 >= 80
    ]

    assert len(text.splitlines()) < 400
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


def test_every_field_of_the_config_is_read():
    read = {
        node.attr
        for name, path in MODULES.items()
        if name != "config"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)
    }

    for section in dataclasses.fields(Config):
        fields = {field.name for field in dataclasses.fields(section.default)}
        if section.name != "mesh":  # whose axes are read all at once
            assert fields <= read, (section.name, fields - read)
