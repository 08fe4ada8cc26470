"""The arrows of the architecture: four leaves, one trunk, one arrow between leaves, no cycles."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDERS = ("gossip", "training", "compression", "proto", "node")
ALLOWED = {
    "gossip": {"gossip"},
    "compression": {"compression"},
    "training": {"training", "compression"},
    "proto": {"proto"},
    "node": set(FOLDERS),
}
HUGGING_FACE = {"transformers", "peft", "huggingface_hub"}
THIRD_PARTY = {
    "gossip": set[str](),
    "compression": {"torch", "numpy", "numba", "triton", "llvmlite", "constriction", "zstandard"},
    "training": {"torch", "numpy", "sklearn", "safetensors", *HUGGING_FACE},
    "proto": {"google", "grpc", "grpc_tools", "collections", "typing"},
}
TRUNK_ONLY = {"asyncio", "time", "grpc", "socket", "threading", "subprocess"}


def modules() -> list[Path]:
    return sorted(p for f in FOLDERS for p in (ROOT / f).rglob("*.py"))


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module or "")
    return found


def name(path: Path) -> str:
    return ".".join(("shoal", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    )


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_every_arrow_points_the_right_way(path: Path) -> None:
    folder = path.relative_to(ROOT).parts[0]
    generated = "_pb2" in path.name
    for module in imports(path):
        if module.startswith("shoal."):
            assert module.split(".")[1] in ALLOWED[folder], f"{path} imports {module}"
        elif folder != "node" and not generated:
            root = module.split(".")[0]
            assert root not in TRUNK_ONLY, f"{path}: only node/ may import {module}"
            third_party = root not in sys.stdlib_module_names
            assert not third_party or root in THIRD_PARTY[folder], f"{path} imports {module}"


def test_the_gossip_core_draws_no_global_randomness() -> None:
    for path in (ROOT / "gossip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                bad = node.value.id == "random" and node.attr != "Random"
                assert not bad, f"{path}:{node.lineno} uses random.{node.attr}"


def test_the_daemon_never_reaches_torch() -> None:
    """Follow module-level imports from the daemon: no path may lead to torch or numpy."""
    files = {name(p): p for p in modules()}
    todo, seen = ["shoal.node.daemon", "shoal.node.cli"], set[str]()
    while todo:
        module = todo.pop()
        if module in seen or module not in files:
            continue
        seen.add(module)
        found = imports(files[module], top_level=True)
        bad = {m for m in found if m.split(".")[0] in {"torch", "numpy", "sklearn", "safetensors"}}
        assert not bad, f"{module} imports {bad}"
        todo += found


def test_there_are_no_import_cycles() -> None:
    files = {name(p): p for p in modules()}
    graph = {m: {i for i in imports(p) if i in files} for m, p in files.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(graph):
        visit(module, ())


def test_the_five_folders_have_no_init() -> None:
    """A root folder with __init__.py would shadow the standard library's `compression` (3.14)."""
    for folder in FOLDERS:
        assert not (ROOT / folder / "__init__.py").exists()
