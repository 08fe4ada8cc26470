"""Every command of the README is one that exists, and its example is run as it stands there."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.node import cli
from shoal.node.http import openapi

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = ("README.md", "CONTRIBUTING.md")
SHELL_WORDS = {"export", ".", "python"}
"""Commands that the example's own test runs."""


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text()
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands() -> Iterator[str]:
    """Yield each line of each sh block, and each `shoal …` in the running text."""
    for document in DOCUMENTS:
        for block in blocks(document, "sh"):
            yield from (line for line in block.splitlines() if line.strip())
        prose = re.sub(r"^```.*?^```", "", (ROOT / document).read_text(), flags=re.M | re.S)
        for text in re.findall(r"`((?:shoal|make) [^`]+)`", prose):
            yield " ".join(text.split())


def words(command: str) -> list[str]:
    found = shlex.split(command.replace("$PORT", "1").replace("$(cat token)", "t"), comments=True)
    return [word for word in found if not re.fullmatch(r"[A-Z]+=.*", word)]


@pytest.mark.parametrize("command", sorted(set(commands())))
def test_every_command_is_one_that_exists(command: str) -> None:
    argv = words(command)
    match argv[0]:
        case "shoal":
            if argv[1:] != ["--help"]:
                cli.build().parse_args(argv[1:])
        case "make":
            makefile = (ROOT / "Makefile").read_text()
            assert re.search(rf"^{argv[1]}:", makefile, re.MULTILINE)
        case "curl":
            url = next(word for word in argv if "localhost" in word)
            method = "post" if "POST" in argv else "get"
            path = "/" + url.split("/", 1)[1]
            assert method in openapi()["paths"][path]
        case other:
            assert other in SHELL_WORDS, f"nothing checks {command!r}"


def test_the_documents_name_only_files_that_exist() -> None:
    for document in DOCUMENTS:
        text = (ROOT / document).read_text()
        for name in re.findall(r"`((?:[a-z0-9_]+/)+[a-z0-9_.]+\.[a-z]+)`", text):
            assert (ROOT / name).exists(), f"{document} names {name}"
        for name in re.findall(r"\]\(([A-Z]+\.md)\)", text):
            assert (ROOT / name).exists(), f"{document} links {name}"


# ---------------------------------------------------------------- the example


def example(folder: Path) -> list[str]:
    """Write the example's files; return its commands."""
    for language in ("python", "toml"):
        (block,) = blocks("README.md", language)
        name = re.match(r"# (\S+)\n", block)
        assert name is not None, "the first line of the block names its file"
        (folder / name[1]).write_text(block)
    (script,) = (block for block in blocks("README.md", "sh") if "PYTHONPATH" in block)
    return script.splitlines()


def shell(folder: Path, script: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Run it as a person would, with this environment's python and shoal."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def test_the_example_learns_by_itself(tmp_path: Path) -> None:
    """The task, its run file and its data, without a swarm: the yardstick of --baseline."""
    prepare = [line for line in example(tmp_path) if not line.startswith("shoal")]
    alone = "python -m shoal.node.alone curve.toml 0/3 {} --data points.csv --allow-task"
    script = "\n".join([*prepare, *(f"{alone.format(n)} curve:Curve" for n in (1, 400))])
    done = shell(tmp_path, script, 280)
    assert done.returncode == 0, done.stderr
    first, last = (json.loads(line)["alone"] for line in done.stdout.splitlines())
    assert last < first / 2


@pytest.mark.real
def test_the_example_learns_in_a_swarm(tmp_path: Path) -> None:
    done = shell(tmp_path, "\n".join(example(tmp_path)), 280)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "swarm-curve" / "summary.json").read_bytes())
    assert summary["equal"]
    assert summary["after"] < summary["before"] / 2
    assert "squared error" in done.stdout
