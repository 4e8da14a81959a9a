"""Which requests are looked at, over what time their routes are summed up, and why one was not counted."""

from enum import StrEnum
from hashlib import blake2b

from pydantic import Field

from moestro.config import Config
from moestro.config.seeds import Seed


class Sampling(Config):
    """How much of the traffic is looked at, and how its figures are formed."""

    share: float = Field(default=0.05, ge=0, le=1)
    """Share of the requests whose routes are counted."""
    seed: Seed = 0
    """Which requests these are: the same seed and share choose the same ones by their number since the start."""
    queue_requests: int = Field(default=64, ge=1)
    """Requests that wait to be counted, at most; further ones are dropped, and the drops counted."""
    queue_bytes: int = Field(default=64 << 20, ge=1)
    """Bytes of these requests and their answers, at most."""
    idle_requests: int = Field(default=1, ge=0)
    """A stream is asked again only while its model's server answers no more requests than this."""
    window_seconds: float = Field(default=900.0, gt=0)
    """Time over which figures are formed."""
    window_steps: int = Field(default=15, ge=1)
    """Steps in which the window slides on."""
    min_tokens: int = Field(default=2000, ge=1)
    """Tokens in the window below which there are no figures: so few say more about themselves than about the model."""
    dead_share: float = Field(default=0.01, ge=0, le=1)
    """An expert is dead if its load is below this share of what uniform routing would give it."""
    max_series: int = Field(default=4096, ge=0)
    """Models with more layers times experts get no time series per expert, only such per layer."""
    max_versions: int = Field(default=16, ge=1)
    """Versions of models that are kept in mind; the one that was sampled longest ago goes first."""

    def chooses(self, number: int) -> bool:
        """Whether the `number`th request is looked at; numbers are chosen independently of each other."""
        digest = blake2b(f"{self.seed}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest) < self.share * 2**64


class Reason(StrEnum):
    """Why a request that was chosen is not counted."""

    QUEUE_FULL = "queue_full"
    """Too many others wait."""
    NOT_ASKED = "not_asked"
    """It was a stream, and nobody asks again here."""
    BUSY = "busy"
    """It was a stream, and its model's server had other requests to answer."""
    ASK_FAILED = "ask_failed"
    """It was a stream, and asking again failed."""
    STEERED = "steered"
    """A steering profile changed its routing on purpose."""
    NO_ROUTING = "no_routing"
    """vLLM returns no routing for this model."""
    NO_ANSWER = "no_answer"
    """The answer holds no completion; refusals are of this kind."""
    NO_ROUTES = "no_routes"
    """The completion came without routes."""
    BAD_ROUTES = "bad_routes"
    """The routes cannot be right: rows missing, ids out of range, an expert twice."""
    LOST = "lost"
    """The model's files cannot be read."""
    ERROR = "error"
    """Something else, which the log tells."""


class NotCountedError(Exception):
    """A request is not counted, for a `reason`."""

    def __init__(self, reason: Reason) -> None:
        super().__init__(reason)
        self.reason = reason
