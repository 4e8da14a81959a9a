"""The deploy stage: what is served, and the gates it has to pass first, each with its thresholds.

Bounds called `max_` and `min_` refuse a deployment as such. Those of an increase, a drop or a ratio hold against the
champion when the deployment is promoted (`moestro.deployment.comparison`); None leaves a bound out.
"""

from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from moestro.config.base import Config
from moestro.config.data import DomainName, TaskConfig

SHORTEST_SERVED = 64
"""Fewest positions a deployment may have; what the latency gate sends by default fits in them."""

Positive = Annotated[float, Field(gt=0)]
Ratio = Annotated[float, Field(ge=1)]


class ParityGate(Config):
    """The served model against transformers: is what answers what the checkpoint says?"""

    sequences: int = Field(4, ge=1)
    """Held-out sequences per domain."""
    sequence_length: int = Field(128, ge=8)
    """Their length."""
    max_logprob_difference: float = Field(1e-3, gt=0)
    """Largest allowed difference of a token's log-probability."""
    min_routing_agreement: float = Field(0.99, gt=0, le=1)
    """Smallest allowed share of (token, layer) pairs routed to the same experts."""


class QualityGate(Config):
    """What the checkpoint is worth: held-out loss of every domain, and the accuracy of greedy answers to a task."""

    sequence_length: int = Field(256, ge=8)
    """Length of the held-out windows; shorter where `max_model_len` or the text is."""
    max_tokens: int = Field(4096, ge=64)
    """Held-out tokens per domain."""
    task: TaskConfig | None = None
    """A task whose answers are checked."""
    problems: int = Field(128, ge=8)
    """Problems of the task (never among the training problems). More tell smaller drops from noise."""
    max_answer_tokens: int = Field(16, ge=1)
    """Longest answer."""
    max_held_out_loss: dict[DomainName, Positive] = Field(default_factory=dict)
    """Largest allowed held-out loss by domain, nats per token; domains that are not named have no bound. A loss that
    is not a finite number is refused in any case."""
    min_accuracy: float | None = Field(None, ge=0, le=1)
    """Smallest allowed share of right answers."""
    max_loss_increase: float | None = Field(0.05, ge=0)
    """Against the champion: largest allowed increase of a domain's held-out loss, nats per token."""
    max_accuracy_drop: float | None = Field(0.02, ge=0, le=1)
    """Against the champion: refused if accuracy fell by more than this, at 95% confidence, over the same problems."""

    @model_validator(mode="after")
    def _accuracy_needs_a_task(self) -> "QualityGate":
        if self.min_accuracy is not None and self.task is None:
            raise ValueError("min_accuracy: without a task there is no accuracy; name one in `task`")
        return self


class RoutingGate(Config):
    """The health of the routing that vLLM reports for held-out text of all domains."""

    max_tokens: int = Field(2048, ge=8)
    """Held-out tokens per domain, in windows of `parity.sequence_length`."""
    dead_below: float = Field(0.01, ge=0, lt=1)
    """An expert is dead if its share of its layer's choices is zero, or below this part of an even share."""
    max_dead_share: float = Field(0.1, ge=0, le=1)
    """Largest allowed share of dead experts among those of all layers."""
    max_load_variation: float = Field(1.5, gt=0)
    """Largest allowed standard deviation of the loads of a layer's experts over their mean, in the worst layer."""


class LatencyGate(Config):
    """How fast the server answers over REST: medians, of this machine as busy as it is."""

    requests: int = Field(12, ge=3)
    """Requests that are timed."""
    concurrency: int = Field(2, ge=1)
    """How many are under way at a time."""
    prompt_tokens: int = Field(32, ge=1)
    """Tokens of a prompt."""
    output_tokens: int = Field(16, ge=2)
    """Tokens of an answer."""
    max_first_token_seconds: Positive | None = None
    """Longest allowed median time to the first token."""
    max_per_token_seconds: Positive | None = None
    """Longest allowed median time of each token after it."""
    max_ratio: Ratio | None = 1.5
    """Against the champion, on the same machine: largest allowed ratio of either time. Differences below
    `negligible_first_token_seconds` and `negligible_per_token_seconds` are never refused."""
    negligible_first_token_seconds: float = Field(0.5, ge=0)
    """Difference from the champion's time to the first token that is put down to the machine's other work.
    The default is for one that is shared; on a machine of its own it can be near zero."""
    negligible_per_token_seconds: float = Field(0.2, ge=0)
    """The same for each token after it."""


class MemoryGate(Config):
    """What the server takes: bytes of its weights, and the peak of its processes' resident memory."""

    max_weights_gib: Positive | None = None
    """Largest allowed size of the weights, GiB."""
    max_peak_gib: Positive | None = None
    """Largest allowed peak of resident memory, GiB."""
    max_ratio: Ratio | None = 1.5
    """Against the champion: largest allowed ratio of either."""


class DeployConfig(Config):
    """Serve the final checkpoint, if it passes the gates."""

    name: str = Field("assistant", pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")
    """Name under which the model is served and registered."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type vLLM computes in."""
    max_model_len: int = Field(512, ge=SHORTEST_SERVED)
    """Longest sequence served."""
    tool_call_parser: str = Field("", pattern=r"^[a-z0-9_]{0,40}$")
    """vLLM's parser of the model's way to write tool calls (`hermes`, `llama3_json`, ...). Empty: calls are not parsed,
    and asking for one is an error."""
    parity: ParityGate = ParityGate()
    """Does vLLM compute what the checkpoint says?"""
    quality: QualityGate = QualityGate()
    """Is it good enough?"""
    routing: RoutingGate = RoutingGate()
    """Do its experts work?"""
    latency: LatencyGate = LatencyGate()
    """Is it fast enough?"""
    memory: MemoryGate = MemoryGate()
    """Is it small enough?"""
    force: Annotated[str, StringConstraints(strip_whitespace=True, max_length=500)] = ""
    """A reason to publish the deployment although gates refuse it; recorded with their figures. Empty: they decide."""
    sample_prompt: str = "Question: What is 12 + 7?\nAnswer:"
    """Asked over REST once the deployment stands."""

    @model_validator(mode="after")
    def _gates_fit(self) -> "DeployConfig":
        if self.parity.sequence_length >= self.max_model_len:
            raise ValueError("deploy.parity.sequence_length must be below deploy.max_model_len")
        if self.latency.prompt_tokens + self.latency.output_tokens > self.max_model_len:
            raise ValueError("deploy.latency: prompt_tokens and output_tokens together exceed deploy.max_model_len")
        return self
