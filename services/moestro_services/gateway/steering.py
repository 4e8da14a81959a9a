"""Steering profiles at the gateway: who may use one, which servers know it, and what a request becomes.

A request names a profile in the field `steering_profile`, by name (then the newest version) or by the beginning of its
fingerprint. Only admins may: steering can strip a model of what it was taught to refuse (arXiv 2502.11096, 2509.09660).
Requests carry ids of published artifacts and never experts, formulas or paths; a server reads the profiles of its
checkpoint when it starts.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moestro.artifacts import ArtifactStore, Record
from moestro.errors import ArtifactError, InputError
from moestro.inference.steering import (
    PROFILE_ARGUMENT,
    RESERVED_ARGUMENTS,
    RESERVED_SALTS,
    cache_salt,
    steering_arguments,
)
from moestro.models.steering_profiles import Profile
from moestro_services.gateway.caller import Caller, Scope
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.errors import Refused

LOG = logging.getLogger(__name__)
FIELD = "steering_profile"
STAGE = "steer"
MIN_PREFIX = 8
"""Digits of a fingerprint that name a profile."""


@dataclass(frozen=True)
class Published:
    """A published profile."""

    name: str
    fingerprint: str
    checkpoint: str
    """Fingerprint of the checkpoint it steers."""
    path: Path

    def called(self, reference: str) -> bool:
        """Whether a request that says `reference` may mean it."""
        return self.name == reference or (len(reference) >= MIN_PREFIX and self.fingerprint.startswith(reference))


class Steering:
    """What the servers know, and what requests may ask for. One object for the whole gateway."""

    def __init__(self, store: ArtifactStore) -> None:
        """Profiles are the artifacts of the steer stage in `store`."""
        self._store = store
        self._served: dict[str, tuple[Published, ...]] = {}

    def published(self, checkpoint: str | None = None) -> tuple[Published, ...]:
        """All profiles, or those of the checkpoint with this fingerprint, newest first."""
        found = tuple(_published(path, record) for path, record in self._store.records(STAGE))[::-1]
        return tuple(profile for profile in found if checkpoint in (None, profile.checkpoint))

    def server_arguments(self, deployment: Deployment) -> tuple[list[str], dict[str, str]]:
        """Further arguments and environment for the start of the deployment's server; both empty without profiles.

        From now on requests to `deployment` may name these profiles. Call it before every start. A profile that cannot
        be read, or is not what was published, is left out with a warning: the model is served all the same.
        """
        profiles = tuple(filter(self._sound, self.published(deployment.checkpoint.fingerprint)))
        arguments, environment = steering_arguments({profile.fingerprint: profile.path for profile in profiles})
        self._served[deployment.fingerprint] = profiles
        return arguments, environment

    def prepare(self, caller: Caller, deployment: Deployment, body: dict[str, Any]) -> dict[str, Any]:
        """The body as vLLM is to get it; `body` itself if it names no profile. Raises `Refused`."""
        _refuse_reserved(body)
        if FIELD not in body:
            return body
        reference = body[FIELD]
        if not caller.may(Scope.ADMIN):
            raise Refused(403, "Steering profiles are for keys with the scope admin.", param=FIELD)
        if not isinstance(reference, str) or not reference:
            raise Refused(400, f"{FIELD} must be a profile's name or the beginning of its fingerprint.", param=FIELD)
        if body.get("use_beam_search"):
            raise Refused(400, "Beam search cannot be steered.", param="use_beam_search")
        return _steered(body, self._meant(deployment, reference))

    def _sound(self, profile: Published) -> bool:
        try:
            self._store.find(STAGE, profile.fingerprint)  # verifies its files
            Profile.read(profile.path)
        except (ArtifactError, InputError) as error:
            LOG.warning("steering profile %s is left out: %s", profile.name, error)
            return False
        return True

    def _meant(self, deployment: Deployment, reference: str) -> Published:
        served = self._served.get(deployment.fingerprint, ())
        if found := _best(served, reference):
            return found
        elsewhere = [profile for profile in self.published() if profile.called(reference)]
        if not elsewhere:
            known = ", ".join(profile.name for profile in served) or "none"
            raise Refused(
                404,
                f"There is no steering profile {reference!r}; {deployment.name!r} has {known}.",
                code="profile_not_found",
                param=FIELD,
            )
        if not any(profile.checkpoint == deployment.checkpoint.fingerprint for profile in elsewhere):
            raise Refused(
                400, f"Steering profile {reference!r} is for another checkpoint than {deployment.label}.", param=FIELD
            )
        raise Refused(
            409,
            f"The server of {deployment.label} had no sound steering profile {reference!r} to read when it started; "
            "it looks again at its next start.",
            param=FIELD,
        )


def _published(path: Path, record: Record) -> Published:
    return Published(
        name=str(record.config["name"]),
        fingerprint=record.fingerprint,
        checkpoint=record.inputs["model"].fingerprint,
        path=path.absolute(),
    )


def _best(profiles: tuple[Published, ...], reference: str) -> Published | None:
    """The newest of that name, or else the one whose fingerprint begins so; raises `Refused` if several do."""
    if named := [profile for profile in profiles if profile.name == reference]:
        return named[0]
    found = [profile for profile in profiles if profile.called(reference)]
    if len(found) > 1:
        raise Refused(400, f"{reference!r} begins the fingerprints of several steering profiles.", param=FIELD)
    return found[0] if found else None


def _steered(body: Mapping[str, Any], profile: Published) -> dict[str, Any]:
    arguments, salt = body.get("vllm_xargs"), body.get("cache_salt")
    if not (arguments is None or isinstance(arguments, dict)):
        raise Refused(400, "vllm_xargs must be an object.", param="vllm_xargs")
    if not (salt is None or (isinstance(salt, str) and salt)):
        raise Refused(400, "cache_salt must be a non-empty string.", param="cache_salt")
    rest = {name: value for name, value in body.items() if name != FIELD}
    return rest | {
        "vllm_xargs": {**(arguments or {}), PROFILE_ARGUMENT: profile.fingerprint},
        # A client's own salt still keeps its prefixes apart from those of others.
        "cache_salt": cache_salt(profile.fingerprint, salt or ""),
    }


def _refuse_reserved(body: Mapping[str, Any]) -> None:
    """Raise `Refused` for what would look to vLLM as if it came from here."""
    arguments, salt = body.get("vllm_xargs"), body.get("cache_salt")
    if isinstance(arguments, dict):
        for name in arguments:
            if str(name).startswith(RESERVED_ARGUMENTS):
                raise Refused(400, f"vllm_xargs.{name}: names that begin so are reserved.", param="vllm_xargs")
    if isinstance(salt, str) and salt.startswith(RESERVED_SALTS):
        raise Refused(400, f"Values of cache_salt that begin with {RESERVED_SALTS!r} are reserved.", param="cache_salt")
