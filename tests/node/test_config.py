"""Run files and node.toml: what is wrong is said in one line that names the key and the remedy."""

import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.node.config import (
    NodeConfig,
    RunFile,
    canonical,
    parse_libp2p,
    parse_shard,
    to_toml,
)
from shoal.node.errors import ConfigError

BUILT_IN = """
[run]
name = "stdlib-bytes"
seed = 7
turns = 40
[task]
name = "text"
model = { layers = 2, width = 64, heads = 4, context = 128 }
[local]
optimizer = { name = "muon", lr = 0.02, adamw_lr = 3e-3, schedule = "wsd" }
batch = 16
steps = 30
[exchange]
mode = "ledger"
update = { kind = "dense", levels = 3, momentum = 0.6, outer_lr = 0.7 }
[swarm]
admission = "open"
topology = "exponential"
min_peers = 4
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(text)
    return path


def test_the_run_file_of_the_design_is_read_with_defaults_filled_in(tmp_path: Path) -> None:
    run = RunFile.load(written(tmp_path, BUILT_IN))
    assert (run.run.name, run.run.seed, run.run.turns) == ("stdlib-bytes", 7, 40)
    assert run.task.options["model"]["width"] == 64
    assert run.local.optimizer["adamw_lr"] == 3e-3
    assert run.exchange.quantum_bits == 24
    assert run.exchange.pace == "free"


def test_toml_and_canonical_bytes_say_the_same(tmp_path: Path) -> None:
    run = RunFile.load(written(tmp_path, BUILT_IN))
    assert RunFile.parse(tomllib.loads(run.to_toml()), where="x") == run
    data = canonical(run.tables())
    assert RunFile.from_canonical(data, where="x") == run
    assert canonical(RunFile.from_canonical(data, where="x").tables()) == data


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (("turns = 40", "tuns = 40"), r"unknown key 'tuns' in \[run\]: did you mean 'turns'\?"),
        (("[local]", "[locale]"), r"unknown key 'locale': did you mean 'local'\?"),
        (("batch = 16", 'batch = "16"'), "local.batch = '16': expected a whole number"),
        (("batch = 16", "batch = true"), "local.batch = True: expected a whole number"),
        (("batch = 16", "batch = 0"), "local: batch = 0; use at least 1"),
        (("optimizer = {", "optimizer = 3 #"), "local.optimizer = 3: expected a table"),
        (('name = "stdlib-bytes"', 'name = "../x"'), "holds no paths"),
        (('name = "stdlib-bytes"', 'name = "Über"'), "run: name = .* must match"),
        (('name = "stdlib-bytes"', ""), r"key 'name' in \[run\] is missing"),
        (('name = "text"', ""), r"key 'name' in \[task\] is missing"),
        (("steps = 30", "clip = true"), r"unknown key 'clip' in \[local\]"),
        (('mode = "ledger"', "clip = []"), "a whole number or a number or a text"),
        (('"exponential"', "1979-05-27"), "dates and times have no place"),
        (('admission = "open"', 'admission = "invite"'), "not built yet"),
        (('admission = "open"', 'admission = "opn"'), "use one of open"),
        (('mode = "ledger"', 'mode = "mixing"'), "not built yet"),
        (("min_peers = 4", "min_peers = 5000"), "use 1 to 512"),
        (("seed = 7", "seed = -1"), "use one from 0"),
        (("lr = 0.02", "lr = nan"), "expected a finite number"),
        (("width = 64", 'width = "/etc/passwd"'), "a run file holds no paths"),
        (("width = 64", 'width = "~/x"'), "a run file holds no paths"),
        (("width = 64", 'width = "\\u001b[2J"'), "all printable"),
        (('name = "text"', 'name = "os;x"'), "use the name of a task"),
        (("[run]", "[run"), "not valid TOML.*line 2"),
        (("seed = 7", f"seed = {'9' * 5000}"), "not valid TOML"),
        (("seed = 7", f"seed = 0x{'f' * 5000}"), "not valid TOML: an integer has more than 64"),
        (("lr = 0.02", "lr = [1, {x = 9223372036854775808}]"), "more than 64 bits"),
    ],
)
def test_a_wrong_run_file_is_one_line_that_names_the_key(
    tmp_path: Path, change: tuple[str, str], complaint: str
) -> None:
    assert change[0] in BUILT_IN
    path = written(tmp_path, BUILT_IN.replace(*change, 1))
    with pytest.raises(ConfigError, match=complaint) as caught:
        RunFile.load(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_missing_table_is_named() -> None:
    with pytest.raises(ConfigError, match=r"table \[task\] is missing"):
        RunFile.parse({"run": {"name": "x"}, "local": {"steps": 1}}, where="f")


@pytest.mark.parametrize("kind", ["missing", "directory", "binary", "huge"])
def test_a_file_that_is_no_run_file_is_said_to_be_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "run.toml"
    match kind:
        case "directory":
            path.mkdir()
        case "binary":
            path.write_bytes(b"\xff\xfe\x00")
        case "huge":
            path.write_bytes(b"#" * (1 << 19))
    with pytest.raises(ConfigError, match=r"run\.toml"):
        RunFile.load(path)


json_values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)
tables = st.dictionaries(
    st.sampled_from(["run", "task", "local", "exchange", "swarm", "x"]),
    st.dictionaries(st.sampled_from(["name", "seed", "steps", "model", "update"]), json_values),
)


@given(tables | json_values)
def test_a_strangers_tables_are_read_or_refused_never_more(value: object) -> None:
    try:
        run = RunFile.parse(value, where="genesis")
    except ConfigError as error:
        assert "\n" not in str(error)  # noqa: PT017 - both outcomes are right
        return
    assert RunFile.parse(run.tables(), where="again") == run


@given(st.binary(max_size=200))
def test_a_strangers_bytes_are_read_or_refused_never_more(data: bytes) -> None:
    with pytest.raises(ConfigError):
        RunFile.from_canonical(data, where="genesis")


@pytest.mark.parametrize(
    "data",
    [
        b"[" * 100_000,
        b'{"run":' * 1000,
        b'{"run":{"name":"a","name":"b"},"task":{"name":"text"},"local":{"steps":1}}',
        b'{"run":{"name":"a"},"task":{"name":"text"},"local":{"steps":NaN}}',
        b" " * (1 << 19),
        b'{"run":{"name":"a","seed":' + b"9" * 5000 + b"}}",
    ],
)
def test_hostile_json_is_refused(data: bytes) -> None:
    with pytest.raises(ConfigError):
        RunFile.from_canonical(data, where="genesis")


def test_the_shard_counts_from_zero() -> None:
    assert parse_shard("3/4") == (3, 4)
    for text, complaint in {
        "4/4": "the last of 4 is 3/4",
        "0/0": "at least one part",
        "a/b": "write i/N",
        "1": "write i/N",
        "-1/4": "write i/N",
    }.items():
        with pytest.raises(ConfigError, match=complaint):
            parse_shard(text)


def test_node_toml_keeps_what_the_command_line_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = {"data": "corpus", "shard": "1/4", "advertise": (), "device": None, "observe": True}
    config = NodeConfig().merged(flags)
    assert config.data == str(tmp_path / "corpus")
    config.save(tmp_path / "node.toml")
    assert NodeConfig.load(tmp_path / "node.toml") == config
    again = NodeConfig.load(tmp_path / "node.toml").merged({"advertise": ("/ip4/10.0.0.1/tcp/1",)})
    assert (again.advertise, again.shard) == (("/ip4/10.0.0.1/tcp/1",), "1/4")
    for port in ("off", "4001", "0"):
        again.merged({"libp2p": port}).save(tmp_path / "node.toml")
        again = NodeConfig.load(tmp_path / "node.toml")
        assert parse_libp2p(again.libp2p) == {"off": None, "4001": 4001, "0": 0}[port]
    assert NodeConfig.load(tmp_path / "none.toml") == NodeConfig()


@pytest.mark.parametrize(
    ("given", "port"),
    [
        ({}, 0),
        ({"listen": "0.0.0.0:7464"}, 0),
        ({"listen": "10.0.0.1:0"}, 0),
        ({"listen": "127.0.0.1:0"}, None),
        ({"listen": "[::1]:7464"}, None),
        ({"listen": "127.0.0.1:0", "libp2p": "0"}, 0),
        ({"listen": "127.0.0.1:0", "advertise": ("/ip4/10.0.0.1/tcp/1",)}, 0),
        ({"libp2p": "off"}, None),
        ({"libp2p": "4001"}, 4001),
    ],
)
def test_who_listens_on_loopback_alone_opens_no_port_of_libp2p(
    given: dict[str, object], port: int | None
) -> None:
    assert NodeConfig().merged(given).libp2p_port() == port


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("threds = 3", "did you mean 'threads'"),
        ('advertise = "x"', "expected a list"),
        ('shard = "9/3"', "the last of 3"),
        ('libp2p = "on"', "off, or a TCP port"),
        ('libp2p_peer = ["/ip4/10.0.0.1/tcp/1"]', "libp2p address such as"),
        ('limits = "lam"', "did you mean 'lan'"),
        ("log_gigabytes = -1", "too small"),
        ('allow_task = "pkg"', "package.module:Factory"),
    ],
)
def test_a_wrong_node_toml_names_file_and_key(tmp_path: Path, text: str, complaint: str) -> None:
    path = tmp_path / "node.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=complaint) as caught:
        NodeConfig.load(path)
    assert str(caught.value).startswith(str(path))


def test_the_preset_gives_the_limits() -> None:
    assert NodeConfig(limits="wan").preset().probe_interval > NodeConfig().preset().probe_interval
    assert NodeConfig(log_gigabytes=0.5).preset().log_bytes == 1 << 29


def test_toml_is_written_so_that_it_is_read_back() -> None:
    tables = {
        "flat": [1, 2.5, "x"],
        "t": {"odd key": 'q"\\', "empty": {}, "deep": {"a": {"b": True}}, "tiny": 1e-9},
    }
    assert tomllib.loads(to_toml(tables)) == tables
