"""The gateway of a home as users meet it, whose models and lifecycles are answered and run by stand-ins."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from pydantic import ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from moestro.artifacts import Artifact
from moestro.registry import ModelRegistry, ModelVersion
from moestro_flows.home import Home
from moestro_services.audit import Audit, AuditEntry
from moestro_services.catalog import Catalog
from moestro_services.gateway import caller
from moestro_services.gateway.assembly import Assembled, Policy, assembled
from moestro_services.gateway.connections import careful
from moestro_services.gateway.controller import Controller
from moestro_services.gateway.deployments import Deployment
from moestro_services.gateway.expert_metrics_sampling import Sampling
from moestro_services.gateway.fleet import Fleet
from moestro_services.gateway.keys import Key, KeyRing
from moestro_services.gateway.lifecycles_feed import Feeds
from moestro_services.gateway.lifecycles_runs import Lifecycles
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.openapi_v1 import REQUESTS
from moestro_services.gateway.replica import Backoff
from moestro_services.gateway.sources import Registered
from moestro_services.gateway.watch import RollbackRule

PROGRAM = """
import json, os, sys
from pathlib import Path

home, config = Path(os.environ["MOESTRO_HOME"]), Path(sys.argv[2])
events = Path(sys.argv[sys.argv.index("--events") + 1])
run = "20260101-000000-" + os.urandom(2).hex()
assert sys.argv[1] == "run" and config.is_file() and {"--json", "--no-ask"} < set(sys.argv)
assert os.getsid(0) == os.getpid() and sys.stdin.read() == ""


def tell(event, **content):
    with events.open("a") as stream:
        stream.write(json.dumps({"event": event, **content}) + "\\n")


def record(status):
    (home / "runs").mkdir(exist_ok=True)
    run_record = {"id": run, "name": "small", "status": status, "config": {}, "started_at": "2026-01-01T00:00:00Z"}
    (home / "runs" / f"{run}.json").write_text(json.dumps(run_record))


def ended(step, **other):
    content = {"stage": "corpus", "fingerprint": "f" * 64, "status": "completed", "reused": False, "message": ""}
    tell("ended", step=step, **content | {"seconds": 1.5, "result": None} | other)


def obey(order):
    if order == "progress":
        left = {"seconds": 1.0, "seconds_left": None}
        tell("progress", step="corpus code", done=1, total=2, message="", figures={"loss": float("nan")}, **left)
    elif order == "end":
        ended("corpus code")
        ended("seed", reused=True)
        record("completed")
        sys.exit(0)
    elif order == "fail":
        ended("corpus code", status="failed", message="no text")
        record("failed")
        print(json.dumps({"error": {"kind": "InputError", "message": "no text", "hint": "Give some."}}))
        sys.exit(2)


if (home / "refuse").exists():
    print(json.dumps({"error": {"kind": "ConfigError", "message": "no such thing", "hint": ""}}))
    sys.exit(2)
try:
    tell("planned", run=run, name="small", steps=["corpus code", "seed"])
    record("running")
    tell("started", step="corpus code")
    if (home / "orders").exists():
        with open(os.open(home / "orders", os.O_RDWR)) as orders:
            for line in orders:
                for order in line.split():
                    obey(order)
    obey("end")
except KeyboardInterrupt:
    ended("corpus code", status="cancelled")
    record("cancelled")
    sys.exit(130)
"""


class StandIn:
    """Answers in the form of vLLM's answers, the same to all that is well-formed, and refuses the rest as vLLM does."""

    def __init__(self) -> None:
        self.url = ""
        self.api_key = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            response = self._answer(scope["path"], await Request(scope, receive).body())
            await response(scope, receive, send)

    def _answer(self, path: str, body: bytes) -> Response:
        if path not in REQUESTS:
            return Response()
        try:
            asked = REQUESTS[path][0].model_validate_json(body, strict=True).model_dump()
        except ValidationError as error:
            told = {"message": str(error), "type": "BadRequestError", "param": None, "code": 400}
            return JSONResponse({"error": told}, status_code=400)
        said: dict[str, Any] = {"index": 0, "finish_reason": "stop", "text": " 19"}
        said["message"] = {"role": "assistant", "content": " 19"}
        answer = {"id": "cmpl-1", "created": 1_700_000_000, "model": asked["model"], "choices": [said]}
        answer["object"] = "chat.completion" if "chat" in path else "text_completion"
        if asked["stream"]:
            return Response(f"data: {json.dumps(answer)}\n\ndata: [DONE]\n\n", media_type="text/event-stream")
        return JSONResponse(answer | {"usage": {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}})


class Api:
    """The gateway of `home` with a key of each scope. Lifecycles obey `orders` until these end them.

    Models are those of the home's registry, and are served as soon as that is changed.
    """

    def __init__(self, home: Home, make: Any, stand_in: Any, rule: RollbackRule | None) -> None:
        """`make` makes a model server that is no process, of what answers for it."""
        self.home = home
        self.servers: dict[str, Any] = {}
        """Other servers than that of the stand-in, by version."""
        program = home.path / "program.py"
        program.write_text(PROGRAM)
        self.runs = Lifecycles(home, command=(sys.executable, "-S", "-E", str(program)))
        self.feeds = Feeds(self.runs, heartbeat=0.2)
        ring = KeyRing.of(home)
        made = {scope.value: ring.create(scope.value, [scope]) for scope in caller.Scope}
        self.keys: dict[str, Key] = {word: key for word, (key, _) in made.items()}
        self.secrets = {word: secret for word, (_, secret) in made.items()}
        self.policy = Policy(keys=ring, rule=rule, sampling=Sampling(share=1.0))
        self.models = ModelRegistry(home.mlflow_uri, home.mlflow_files)
        self.source = Registered(home, self.models.models)
        self.fleet = Fleet(self._open, backoff=Backoff(first=3600.0))
        self.assembled: Assembled
        self._make, self._stand_in = make, stand_in

    def _open(self, version: ModelVersion) -> tuple[Deployment, Any]:
        deployment, _process = self.source.open(version)
        return deployment, self.servers.get(version.version) or self._make(self._stand_in)

    @contextmanager
    def running(self) -> Iterator["Api"]:
        """Itself, with all that runs beside the application."""
        with (
            self.fleet,
            assembled(self.home, self.fleet, self.policy, self.source.steering, self.feeds) as self.assembled,
            Controller(self.fleet, self.source.read, poll_seconds=3600.0),
        ):
            yield self

    @property
    def audit(self) -> Sequence[AuditEntry]:
        """What was written down, newest first."""
        return Audit.of(self.home).read()

    def wait_for(self, states: Mapping[str, str]) -> None:
        """Wait until the server of each version stands so."""

        def reached(fleet: Fleet) -> bool:
            return states.items() <= {(replica.version, str(replica.state)) for replica in fleet.replicas()}

        assert self.fleet.wait_for(reached, 30), self.fleet.replicas()

    def hold(self) -> None:
        """Lifecycles wait for orders."""
        os.mkfifo(self.home.path / "orders")

    def order(self, *words: str) -> None:
        """Tell the running one; returns when it listens."""
        (self.home.path / "orders").write_text(" ".join(words) + "\n")

    def configured(self, name: str = "small", **changes: Any) -> None:
        """Put a config into the home."""
        self.home.configs.mkdir(exist_ok=True)
        (self.home.configs / f"{name}.yaml").write_text("# A small one,\n# for tests.\n" + json.dumps(CONFIG | changes))


CONFIG = {
    "name": "small",
    "data": {
        "domains": [
            {"name": "code", "source": {"type": "builtin", "name": "stdlib"}},
            {"name": "prose", "source": {"type": "files", "paths": ["corpora/*.txt"]}},
        ]
    },
    "seed": {"type": "pretrain", "training": {"steps": 30}},
    "branch": {"training": {"steps": 20}},
    "tune": {"training": {"steps": 20}},
}


@pytest.fixture(scope="session")
def stand_in() -> Iterator[StandIn]:
    """Answers for all models of all tests."""
    made = StandIn()
    with serving(made, listen("127.0.0.1", 0)) as made.url:
        yield made


@pytest.fixture
def rule() -> RollbackRule | None:
    """When the gateway rolls back: never."""
    return None


@pytest.fixture
def api(
    built_home: Home,
    prepare_mlflow: Callable[..., None],
    fixed_server: Any,
    stand_in: StandIn,
    rule: RollbackRule | None,
) -> Iterator[Api]:
    with Api(built_home, fixed_server, stand_in, rule).running() as made:
        prepare_mlflow(built_home.path)  # after the first look at it: whoever asks for no model opens no database
        yield made
        for started in made.runs.summaries(limit=1000):
            made.runs.stop(started.id)


@pytest.fixture
def url(api: Api) -> Iterator[str]:
    """The API over a real socket."""
    http = careful(api.assembled.traffic.refused)
    with serving(api.assembled.app, listen("127.0.0.1", 0), http) as address:
        yield address


@pytest.fixture
def bearing(api: Api, url: str) -> Iterator[Callable[[str], httpx.Client]]:
    """Clients with a key of the given scope."""
    made: list[httpx.Client] = []

    def client(word: str) -> httpx.Client:
        headers = {"Authorization": f"Bearer {api.secrets[word]}"}
        made.append(httpx.Client(base_url=url, headers=headers, timeout=30, trust_env=False))
        return made[-1]

    yield client
    for one in made:
        one.close()


@pytest.fixture
def admin(bearing: Callable[[str], httpx.Client]) -> httpx.Client:
    return bearing("admin")


@pytest.fixture
def deployment_fingerprint(built_home: Home) -> str:
    return Catalog(built_home).published("deploy").record.fingerprint


@pytest.fixture
def deployed(api: Api, deploying_in: Callable[[Home], Callable[..., Artifact]]) -> Callable[..., str]:
    """Publishes a further deployment of the model `assistant`; gives its fingerprint."""
    deploy = deploying_in(api.home)
    return lambda letter, **content: deploy(letter, **content).fingerprint
