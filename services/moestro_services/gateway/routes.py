"""Which replica answers for which name: immutable tables, so that they are read without a lock and swapped whole."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

from moestro.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS
from moestro_services.gateway.errors import UnavailableError, UnknownModelError
from moestro_services.gateway.replica import Replica, State

ALIASES = (CHAMPION, CHALLENGER, PREVIOUS)


def share_of(name: str, sticky: str) -> float:
    """A number in [0, 1) that is always the same for the same two words, and evenly spread over `sticky`."""
    digest = hashlib.blake2b(f"{name}\0{sticky}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64


@dataclass(frozen=True)
class Route:
    """Who answers for one model."""

    name: str
    aliases: Mapping[str, Replica]
    """By alias, as traffic goes now: the registry's word, as soon as that version answers."""
    versions: Mapping[str, Replica]
    """By version number, of those that have a process."""
    registered: frozenset[str]
    """Version numbers that there are."""
    canary_share: float
    """Share of the bare name's requests that the challenger answers."""
    canary: Replica | None
    """Who is to answer a share, whether it answers now or not."""

    @property
    def champion(self) -> Replica | None:
        """Who answers for the bare name."""
        return self.aliases.get(CHAMPION)

    def pick(self, which: str, sticky: str) -> Replica:
        """The replica for an alias or version number, or for the bare name if `which` is empty.

        Raises `UnknownModelError` if there is none and `UnavailableError` if it does not answer now.
        """
        found = self._bare(sticky) if not which else self.aliases.get(which) or self.versions.get(which)
        if found is None:
            raise UnknownModelError(self._missing(which))
        if not found.serving:
            message = f"The model {found.label!r} does not answer now: it is {_words(found)}."
            raise UnavailableError(message, version=found.version.version)
        return found

    def _bare(self, sticky: str) -> Replica | None:
        if self.canary_share > 0:
            challenger = self.aliases[CHALLENGER]
            if share_of(self.name, sticky) < self.canary_share and challenger.serving:
                return challenger
        return self.champion

    def _missing(self, which: str) -> str:
        if not which:
            return f"The model {self.name!r} has no champion."
        why = "is registered but not served" if which in self.registered else "does not exist"
        served = ", ".join(f"{self.name}@{name}" for name in (*self.aliases, *self.versions))
        return f"The model '{self.name}@{which}' {why}. Served are: {served or 'none'}."


def _words(replica: Replica) -> str:
    return "starting" if replica.state is State.STARTING else "being started again"


def name_in(table: Mapping[str, Route], model: str) -> str:
    """The name of the model that `model` asks for; empty if there is none."""
    return next((name for name in (model, model.rpartition("@")[0]) if name in table), "")


def resolve(table: Mapping[str, Route], model: str, sticky: str) -> Replica:
    """The replica that answers a request for `model`: a name, `name@alias` or `name@version`. Raises as `pick`."""
    name = name_in(table, model)
    if not name or model == f"{name}@":
        raise UnknownModelError(f"The model {model!r} does not exist.")
    return table[name].pick(model[len(name) + 1 :], sticky)
