"""Multiaddrs: strict, canonical, and the machine's own."""

import ipaddress
import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.gossip.names import PeerId, RunId
from shoal.node import addresses
from shoal.node.addresses import (
    Address,
    AddressError,
    Listen,
    machine,
    own,
    parse,
    parse_bare,
    parse_join,
    parse_listen,
)
from shoal.node.identity import peer_text

PEER, RUN = PeerId(bytes(range(32))), RunId(bytes(range(32, 64)))
ID = peer_text(PEER)


def usable(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    return not (ip.is_unspecified or ip.is_multicast)


hosts = st.one_of(
    st.ip_addresses(v=4).filter(usable).map(lambda ip: ("ip4", str(ip))),
    st.ip_addresses(v=6).filter(usable).map(lambda ip: ("ip6", str(ip))),
    st.tuples(
        st.sampled_from(["dns", "dns4", "dns6"]),
        st.from_regex(r"\A[a-z0-9]{1,20}(\.[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?){0,3}\Z"),
    ),
)
keys = st.none() | st.binary(min_size=32, max_size=32)


@given(hosts, st.integers(1, 65535), keys, keys)
def test_an_address_is_read_back_as_written(
    host: tuple[str, str], port: int, peer: PeerId | None, run: RunId | None
) -> None:
    address = Address(*host, port, peer, run)
    assert parse(str(address)) == address
    assert parse_bare(str(address.bare())) == address.bare()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no address"),
        ("203.0.113.5:7464", "no address"),
        ("/ip4/203.0.113.5", "no address"),
        ("/ip4/203.0.113.5/udp/7464", "no address"),
        ("/ip4/203.0.113.5/tcp/7464/", "no address"),
        ("/ip4/203.0.113.5/tcp/7464/p2p", "no address"),
        (f"/ip4/203.0.113.5/tcp/7464/p2p/{ID}/run", "no address"),
        ("/ip4/203.0.113/tcp/7464", "no ip4 address"),
        ("/ip4/203.0.113.05/tcp/7464", "no ip4 address"),
        ("/ip6/203.0.113.5/tcp/7464", "no ip6 address"),
        ("/ip6/fe80::1%eth0/tcp/7464", "zone"),
        ("/ip4/0.0.0.0/tcp/7464", "nobody's"),
        ("/ip4/224.0.0.1/tcp/7464", "nobody's"),
        ("/dns4/a b/tcp/7464", "no host name"),
        ("/dns4//tcp/7464", "no host name"),
        ("/unix/x/tcp/7464", "not understood"),
        ("/ip4/203.0.113.5/tcp/0", "no port"),
        ("/ip4/203.0.113.5/tcp/65536", "no port"),
        ("/ip4/203.0.113.5/tcp/07464", "no port"),
        ("/ip4/203.0.113.5/tcp/٣", "no port"),
        ("/ip4/203.0.113.5/tcp/7464/p2p/12D3KooWxxx", "12D3KooW"),
        (f"/ip4/203.0.113.5/tcp/7464/p2p/{ID}/run/abc", "cut off"),
        ("/ip4/203.0.113.5/tcp/7464" + "/" * 300, "longest"),
    ],
)
def test_what_is_no_address_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(AddressError, match=said) as caught:
        parse(text)
    assert "\n" not in str(caught.value)


@given(st.text(max_size=80) | st.from_regex(r"/(ip4|ip6|dns)/.{1,20}/tcp/.{1,6}(/p2p/.{1,60})?"))
def test_any_text_is_an_address_or_an_address_error(text: str) -> None:
    try:
        address = parse(text)
    except AddressError:
        return
    assert parse(str(address)) == address


def test_a_join_address_names_a_run() -> None:
    text = f"/ip4/203.0.113.5/tcp/7464/p2p/{ID}"
    assert parse_join(f"{text}/run/{RUN.hex()}") == Address("ip4", "203.0.113.5", 7464, PEER, RUN)
    with pytest.raises(AddressError, match="names no run"):
        parse_join(text)


@pytest.mark.parametrize("tail", [f"/p2p/{ID}", f"/run/{RUN.hex()}"])
def test_a_bare_address_names_neither_peer_nor_run(tail: str) -> None:
    with pytest.raises(AddressError):
        parse_bare("/ip4/203.0.113.5/tcp/7464" + tail)


def test_a_bare_address_is_canonical() -> None:
    with pytest.raises(AddressError):
        parse_bare("/ip6/2001:DB8:0::1/tcp/7464")


@pytest.mark.parametrize(
    ("text", "listen"),
    [
        ("0.0.0.0:7464", Listen("0.0.0.0", 7464)),
        (":0", Listen("", 0)),
        ("*:1", Listen("", 1)),
        ("[::]:7464", Listen("::", 7464)),
        ("localhost:7", Listen("127.0.0.1", 7)),
    ],
)
def test_listen_takes_host_and_port(text: str, listen: Listen) -> None:
    assert parse_listen(text) == listen


@pytest.mark.parametrize("text", ["", "7464", "host:7464", "0.0.0.0:x", "0.0.0.0:70000"])
def test_other_listen_texts_are_refused(text: str) -> None:
    with pytest.raises(AddressError, match="--listen"):
        parse_listen(text)


def test_the_machine_knows_its_addresses() -> None:
    found = machine()
    assert "127.0.0.1" in found
    for ip in found:
        family = socket.AF_INET6 if ":" in ip else socket.AF_INET
        with socket.socket(family) as probe:
            probe.bind((ip, 0))


def test_loopback_is_told_only_when_there_is_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(addresses, "_getifaddrs", lambda: ["127.0.0.1", "::1", "fe80::1"])
    assert [str(a) for a in own("", 7)] == ["/ip4/127.0.0.1/tcp/7"]
    everything = ["::1", "2001:db8::1", "127.0.0.1", "10.0.0.7", "10.0.0.8"]
    monkeypatch.setattr(addresses, "_getifaddrs", lambda: everything)
    told = [str(a) for a in own("", 7)]
    assert told == ["/ip4/10.0.0.7/tcp/7", "/ip4/10.0.0.8/tcp/7", "/ip6/2001:db8::1/tcp/7"]
    assert [a.host for a in own("0.0.0.0", 7)] == ["10.0.0.7", "10.0.0.8"]
    assert [a.host for a in own("::", 7)] == ["10.0.0.7", "10.0.0.8", "2001:db8::1"]
    assert [a.host for a in own("10.0.0.8", 7)] == ["10.0.0.8"]
