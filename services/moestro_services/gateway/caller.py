"""`Caller`: who asks, and what they may."""

from dataclasses import dataclass
from enum import StrEnum

from starlette.types import Scope as AsgiScope

CALLER = "moestro.caller"
"""Key of the request's scope under which the door leaves the caller."""


class Scope(StrEnum):
    """What a key allows. `admin` implies the others."""

    READ = "read"
    INFER = "infer"
    ADMIN = "admin"


@dataclass(frozen=True)
class Caller:
    """Whose key a request bears."""

    id: str
    scopes: frozenset[Scope]

    def may(self, scope: Scope) -> bool:
        """Whether the caller has `scope`."""
        return scope in self.scopes or Scope.ADMIN in self.scopes


LOCAL = Caller("local", frozenset(Scope))
"""Everyone on this machine, where no keys are asked for."""


def caller_of(scope: AsgiScope) -> Caller:
    """The caller of the request with this ASGI scope."""
    caller: Caller = scope[CALLER]
    return caller
