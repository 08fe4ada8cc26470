"""The service files say what the command line understands."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from shoal.node import cli

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
UNIT = DEPLOY / "shoal@.service"
RUN_ID = "ab" * 32
PEER = "12D3KooWLRPJAA5o6uwwBMXKUEnxUH3wZ1LxZ4xaPkrVaJ2Mk8nZ"
ADDRESS = f"/ip4/203.0.113.5/tcp/7464/p2p/{PEER}/run/{RUN_ID}"


def understood(words: list[str]) -> argparse.Namespace:
    """Parse as `shoal` does; an unknown flag or command raises."""
    given = [ADDRESS if word == "ADDRESS" else word for word in words]
    args, unknown = cli.build().parse_known_args(given)
    assert unknown == []
    return args


def unit() -> dict[str, list[str]]:
    """Return the unit's settings, each with its values in order."""
    found: dict[str, list[str]] = {}
    for line in UNIT.read_text().splitlines():
        if "=" in line and not line.startswith("#"):
            key, _, value = line.partition("=")
            found.setdefault(key, []).append(value)
    return found


def instructions() -> list[tuple[str, str]]:
    """Return the Dockerfile's instructions with their lines joined and comments gone."""
    lines = [x for x in (DEPLOY / "Dockerfile").read_text().splitlines() if x[:1] != "#"]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines))
    return [
        (line.split(maxsplit=1)[0], line.split(maxsplit=1)[1])
        for line in joined.splitlines()
        if line.strip()
    ]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def test_the_unit_resumes_a_directory() -> None:
    [command] = unit()["ExecStart"]
    program, *words = shlex.split(command.replace("%i", "stdlib-bytes"))
    assert program == "/opt/shoal/bin/shoal"
    args = understood(words)
    assert args.target == Path("/var/lib/shoal/stdlib-bytes")
    assert args.target.parent == Path("/var/lib") / unit()["StateDirectory"][0]
    assert unit()["ConditionPathExists"] == ["/var/lib/shoal/%i/genesis"]


def test_the_unit_does_not_try_again_what_the_operator_must_mend() -> None:
    assert unit()["RestartPreventExitStatus"] == [str(cli.OPERATOR)]


def test_the_unit_leaves_the_sockets_that_discovery_needs() -> None:
    [families] = unit()["RestrictAddressFamilies"]
    assert {"AF_INET", "AF_INET6", "AF_NETLINK", "AF_UNIX"} == set(families.split())


@pytest.mark.real
def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("no systemd-analyze here")
    # The program and the user are not on this machine; everything else is judged as it is.
    text = UNIT.read_text().replace("/opt/shoal/bin/shoal", "/bin/true")
    text = re.sub(r"(?m)^(User|Group)=shoal\n", "", text)
    path = tmp_path / "shoal@stdlib.service"
    path.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", str(path)],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if path.name in line]
    assert complaints == []


def test_the_container_starts_a_daemon_and_asks_for_its_status() -> None:
    [entry], [command], [health] = of("ENTRYPOINT"), of("CMD"), of("HEALTHCHECK")
    assert json.loads(entry) == ["shoal"]
    [volume], [port] = of("VOLUME"), of("EXPOSE")
    target = understood(json.loads(command)).target
    assert target.parent == Path(volume)
    program, *words = json.loads(health[health.index("[") :])
    assert program == "shoal"
    assert understood(words).json
    from shoal.node.addresses import PORT

    assert int(port) == PORT


def test_the_container_copies_all_that_the_wheel_needs() -> None:
    copied = {word for rest in of("COPY") if "--from" not in rest for word in rest.split()[:-1]}
    built = (ROOT / "pyproject.toml").read_text()
    [wheel] = re.findall(r"targets\.wheel\]\nonly-include = (\[.*\])", built)
    assert set(json.loads(wheel)) <= copied
    assert {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"} <= copied
    assert all((ROOT / word).exists() for word in copied)


def test_images_are_named_plainly() -> None:
    images = {rest.split()[0] for rest in of("FROM")}
    assert len(images) == 1
    assert all("/" not in image and ":" in image for image in images)


def test_every_command_in_the_readme_is_understood() -> None:
    text = (DEPLOY / "README.md").read_text()
    blocks = re.findall(r"```sh\n(.*?)```", text, re.S)
    lines = re.sub(r"\\\n\s*", " ", "\n".join(blocks)).splitlines()
    seen = 0
    for line in lines:
        words = shlex.split(line, comments=True)
        for i, word in enumerate(words):
            program = word == "shoal" or word.endswith("/bin/shoal")
            if program and words[i + 1 : i + 2] and words[i + 1] in {"join", "start", "status"}:
                understood(words[i + 1 :])
                seen += 1
                break
    assert seen == 4
