"""`Controller`: the thread that looks at the model registry and lets the fleet follow it."""

import logging
import threading
from collections.abc import Callable, Sequence

from moestro.errors import MoestroError, told
from moestro.registry.model_versions import RegisteredModel
from moestro_services.gateway.fleet import Fleet

POLL_SECONDS = 1.0
LOG = logging.getLogger(__name__)

Read = Callable[[], Sequence[RegisteredModel]]


class Controller:
    """Applies what `read` says, about every second and whenever the fleet is kicked, while in its block.

    If reading fails, the fleet stays as it is, and knows no model if it never succeeded; what went wrong is logged when
    it begins and when it is other.
    """

    def __init__(self, fleet: Fleet, read: Read, *, poll_seconds: float = POLL_SECONDS) -> None:
        """`read` may raise `MoestroError` and `OSError`."""
        self.trouble = ""
        """Why the registry cannot be read; empty while it can."""
        self._fleet = fleet
        self._read = read
        self._poll_seconds = poll_seconds
        self._ending = False
        self._thread = threading.Thread(target=self._follow, name="controller", daemon=True)

    def look(self) -> None:
        """Read once and apply."""
        try:
            models = self._read()
        except (MoestroError, OSError) as error:
            words = told(error)
            if words != self.trouble:
                meanwhile = "traffic stays as it is" if self._fleet.known else "no model is served until it can"
                LOG.warning("The model registry cannot be read; %s: %s", meanwhile, words)
            self.trouble = words
            self._fleet.registry_up = False
            return
        if self.trouble:
            LOG.warning("The model registry can be read again.")
        self.trouble = ""
        self._fleet.registry_up = True
        self._fleet.apply(models)

    def __enter__(self) -> "Controller":
        """Look once in this thread, then go on in another."""
        self.look()
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Stop looking."""
        self._ending = True
        self._fleet.kick()
        self._thread.join()

    def _follow(self) -> None:
        while not self._ending:
            self._fleet.kicked.wait(self._poll_seconds)
            self._fleet.kicked.clear()
            if not self._ending:
                self.look()
