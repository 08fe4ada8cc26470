"""Finding peers with libp2p: mDNS on the local network and rendezvous by run. Hints, never links.

The only folder that knows libp2p and trio. `finder.py` is what the daemon holds: it runs `life.py`
in one thread of its own, starts it again when it fails, and hands what it found to the asyncio
loop; without libp2p its `state` says so and nothing else changes. Nothing outside that thread
imports `life.py`, nor `host.py`, `introductions.py`, `rendezvous.py`, `mdns.py` and `bell.py`,
which it joins; all others are plain values.

What is found is a libp2p address. Two peers then prove to each other, inside libp2p's encrypted
and authenticated channel (noise; plaintext is not offered), that they know the seed of the same
swarm's CA, and only then tell each other where their gRPC listens (`introductions.py`). So neither
a stranger on the local network nor a lying DHT node makes a hint, and strangers learn no gRPC
address from us. A hint still proves nothing about being alive: provider records live for days.

libp2p only finds. Nobody is asked again who has answered, unless links are missing; connections
are closed once nothing is said on them (so none needs pings); and a DHT of nothing but our own run
is left alone. A daemon that has its links thus costs a few bytes a second.
"""
