"""What a stranger gets: pinned dependencies, a wheel with everything in it, targets that exist."""

import re
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LINES = (ROOT / "constraints.txt").read_text().splitlines()


def pins() -> dict[str, str]:
    rows = (line.split("==") for line in LINES if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in rows}


def direct() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"].values()
    every = [Requirement(r) for r in [*PROJECT["dependencies"], *(r for e in extras for r in e)]]
    return [r for r in every if r.name != PROJECT["name"]]  # one extra may contain others


def test_every_line_is_a_plain_pin() -> None:
    """No +cpu, no path, no address: each machine chooses its own build of torch."""
    for line in LINES:
        assert re.fullmatch(r"(#.*|[A-Za-z0-9._-]+==[A-Za-z0-9._!]+)?", line), line


def test_nothing_is_pinned_twice() -> None:
    names = [canonicalize_name(x.split("==")[0]) for x in LINES if x and not x.startswith("#")]
    assert len(names) == len(set(names))


def test_every_direct_dependency_is_pinned_to_what_it_allows() -> None:
    pinned = pins()
    for requirement in direct():
        version = pinned[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement}: pinned to {version}"


def test_every_indirect_dependency_that_is_installed_is_pinned() -> None:
    """Walk what is installed here: whatever a direct dependency pulls in has its line."""
    pinned = pins()
    todo = [(r.name, r.extras) for r in direct()]
    seen = set[tuple[str, frozenset[str]]]()
    while todo:
        name, extras = todo.pop()
        key = (canonicalize_name(name), frozenset(extras))
        if key in seen:
            continue
        seen.add(key)
        assert key[0] in pinned, f"{name} has no line in constraints.txt"
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # libp2p is an extra; CUDA comes with some builds of torch only
        for text in needs:
            need = Requirement(text)
            chosen = ({"extra": extra} for extra in ("", *extras))
            if need.marker is None or any(need.marker.evaluate(env) for env in chosen):
                todo.append((need.name, need.extras))
    assert len(seen) > 40


def test_the_generator_fits_the_runtime_that_libp2p_allows() -> None:
    """grpcio-tools decides what protobuf the generated code demands (style: protobuf < 7)."""
    assert pins()["grpcio-tools"] == "1.76.0"
    assert pins()["protobuf"].startswith("6.")


def test_the_console_script_is_the_command_line() -> None:
    assert PROJECT["scripts"] == {"shoal": "shoal.node.cli:main"}


def test_the_make_targets_that_the_readme_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):", makefile, re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md"):
        named = set(re.findall(r"\bmake ([a-z][a-z0-9-]*)\b(?=[`\n ])", code_of(document)))
        assert named <= targets, f"{document} names {named - targets}"
    assert {"swarm", "test", "test-slow", "check", "proto", "bench"} <= targets


def code_of(document: str) -> str:
    text = (ROOT / document).read_text()
    fenced = re.findall(r"^```[a-z]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return "\n".join([*fenced, *re.findall(r"`[^`\n]+`", text)])


def test_nothing_in_the_repository_names_this_machine() -> None:
    """No home directories, no addresses of private package indexes."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listed.returncode:
        pytest.skip("not a git checkout")
    for name in listed.stdout.decode().split("\0"):
        path = ROOT / name
        if not name or path.is_symlink() or not path.is_file():
            continue
        text = path.read_bytes()
        for word in (b"/home/" + b"user", b"/root" + b"/", b"index" + b"-url"):
            assert word not in text, f"{name} holds {word.decode()}"


@pytest.mark.real
def test_the_wheel_holds_all_that_runs(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    done = subprocess.run(
        [*build, "--outdir", str(tmp_path), str(ROOT)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    held = set(zipfile.ZipFile(wheel).namelist())
    folders = ("node", "gossip", "training", "compression", "proto")
    kinds = (".py", ".pyi", ".proto", ".toml", "py.typed")
    wanted = {
        f"shoal/{path.relative_to(ROOT)}"
        for folder in folders
        for path in (ROOT / folder).rglob("*")
        if path.name.endswith(kinds)
    }
    assert wanted <= held, sorted(wanted - held)
    assert {"shoal/training/runs/text.toml", "shoal/training/runs/digits.toml"} <= held
    assert not [name for name in held if "__pycache__" in name or name.startswith("tests/")]
    assert any(name.endswith("licenses/LICENSE") for name in held)
