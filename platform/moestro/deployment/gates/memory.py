"""What the server takes: bytes of its weights, and what its processes held at their peak while the gates asked."""

from typing import ClassVar

from transformers import PreTrainedModel

from moestro.config import MemoryGate
from moestro.deployment.gates.gate import GIB, Subject, Verdict, above
from moestro.inference.client import Endpoint
from moestro.inference.footprint import peak_memory
from moestro.models.files import weight_files


class Memory:
    """The gate: size of the weights, and peak resident memory of the server's process group. Asked last."""

    timed: ClassVar[bool] = True

    def __init__(self, subject: Subject) -> None:
        """Weigh the checkpoint's files; raises `InputError` if one is missing."""
        self._gate = subject.config.memory
        self._weights = sum(path.stat().st_size for path in weight_files(subject.model.path))
        self._peak = 0

    def ask(self, endpoint: Endpoint, port: int) -> None:  # noqa: ARG002
        """Read the peak of the server's processes."""
        self._peak = peak_memory(port)

    def judge(self, network: PreTrainedModel) -> Verdict:  # noqa: ARG002
        """Hold both against the gate."""
        return Verdict(
            refused=tuple(refusals(self._weights, self._peak, self._gate)),
            thresholds=self._gate,
            figures={"weights_bytes": self._weights},
            times={"peak_memory_bytes": self._peak},
        )


def refusals(weights: int, peak: int, gate: MemoryGate) -> list[str]:
    """What is beyond the gate, with figures and thresholds."""
    return [
        *above("the size of the weights", weights / GIB, gate.max_weights_gib, " GiB"),
        *above("the peak of resident memory", peak / GIB, gate.max_peak_gib, " GiB"),
    ]
