"""The gates before traffic, one a file, in the order in which the server is asked; memory last, for it is a peak."""

from moestro.deployment.gates.gate import Gate, Subject, Verdict
from moestro.deployment.gates.latency import Latency
from moestro.deployment.gates.memory import Memory
from moestro.deployment.gates.parity import Parity
from moestro.deployment.gates.quality import Quality
from moestro.deployment.gates.routing import Routing

__all__ = ["GATES", "Gate", "Subject", "Verdict"]

GATES: dict[str, type[Gate]] = {
    "parity": Parity,
    "quality": Quality,
    "routing": Routing,
    "latency": Latency,
    "memory": Memory,
}
