"""`moestro bench gateway`: what the gateway costs under load, and what is lost when servers die or are exchanged.

`load` is the client, a process of its own; `standin` is an upstream of fixed speed, `hosted` the gateway before one
given server, each a process too, so that no two of them share an interpreter's lock. `throughput` and `latency` compare
with asking the server directly, `faults` kills, promotes and rolls back under load, `bench` brings them together.
"""
