"""The management API over a home, with fakes for fleet, registry, promotions, audit and door."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as AsgiScope

from moestro.artifacts import Artifact
from moestro.errors import BusyError, ConflictError, GateError, InputError, MoestroError
from moestro.registry.model_versions import CHALLENGER, CHAMPION, PREVIOUS, ModelVersion, RegisteredModel
from moestro_flows.home import Home
from moestro_services.catalog import Catalog
from moestro_services.gateway.caller import CALLER, Caller, Scope
from moestro_services.gateway.errors import api_error, refusal
from moestro_services.gateway.inventory import inventory
from moestro_services.gateway.lifecycles import lifecycles
from moestro_services.gateway.lifecycles_feed import Feeds
from moestro_services.gateway.lifecycles_runs import Lifecycles
from moestro_services.gateway.listening import listen, serving
from moestro_services.gateway.management import management
from moestro_services.gateway.management_parts import ManagementParts
from moestro_services.gateway.openapi import describe
from moestro_services.gateway.schemas import ModelCard, ModelList
from moestro_services.served import describe as served

CREATED = datetime(2026, 1, 2, 3, 4, tzinfo=UTC)
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


@dataclass(frozen=True)
class FakeReplica:
    name: str
    version: str
    fingerprint: str
    state: str = "serving"
    in_flight: int = 0
    restarts: int = 0
    reason: str = ""


@dataclass
class FakeFleet:
    running: list[FakeReplica] = field(default_factory=list)

    def replicas(self) -> list[FakeReplica]:
        return list(self.running)


@dataclass(frozen=True)
class FakePromotion:
    name: str
    version: str
    aliases: Mapping[str, str]
    canary_share: float
    forced: str = ""
    refused: tuple[str, ...] = ()
    changed: bool = True


class FakeModels:
    """A registry in memory."""

    def __init__(self) -> None:
        self.held: dict[str, RegisteredModel] = {}

    def models(self) -> list[RegisteredModel]:
        return list(self.held.values())

    def model(self, name: str) -> RegisteredModel:
        if name not in self.held:
            raise InputError(f"There is no model {name!r}.")
        return self.held[name]


@dataclass(frozen=True)
class FakeEntry:
    at: datetime
    actor: str
    action: str
    target: str
    details: Mapping[str, Any]


class FakeAudit:
    def __init__(self) -> None:
        self.entries: list[FakeEntry] = []

    def write(self, actor: str, action: str, target: str, **details: Any) -> None:
        self.entries.insert(0, FakeEntry(CREATED, actor, action, target, details))

    def read(self, limit: int) -> list[FakeEntry]:
        return self.entries[:limit]


class FakePromotions:
    """Changes of a `FakeModels`, with the words that the real ones have; gates refuse what `refuses` says."""

    def __init__(self, models: FakeModels, audit: FakeAudit) -> None:
        self.models = models
        self.audit = audit
        self.refuses: tuple[str, ...] = ()

    def register(self, artifact: Artifact, *, actor: str) -> FakePromotion:
        name = served(artifact).name
        held = self.models.held.get(name) or RegisteredModel(name, (), {}, 0.0)
        version = ModelVersion(
            name, str(len(held.versions) + 1), "deploy", artifact.fingerprint, CREATED, {"dtype": "float32"}
        )
        alias = CHALLENGER if held.versions else CHAMPION
        return self._keep(
            replace(held, versions=(version, *held.versions), aliases={**held.aliases, alias: version.version}),
            version.version,
            "register",
            actor,
        )

    def promote(
        self, name: str, version: str = CHALLENGER, *, share: float | None = None, force: str = "", actor: str
    ) -> FakePromotion:
        held = self.models.model(name)
        number = held.aliases.get(version, version)
        if number not in {one.version for one in held.versions}:
            raise InputError(f"{name} has no version {version!r}.")
        if self.refuses and not force:
            raise GateError("; ".join(self.refuses), hint="`force` promotes anyway.")
        if share is None:
            aliases = {CHAMPION: number, PREVIOUS: held.aliases[CHAMPION]}
        else:
            aliases = {**held.aliases, CHALLENGER: number}
        return self._keep(
            replace(held, aliases=aliases, canary_share=share or 0.0), number, "promote", actor, forced=force
        )

    def rollback(self, name: str, *, reason: str = "", actor: str) -> FakePromotion:
        held = self.models.model(name)
        if PREVIOUS not in held.aliases:
            raise ConflictError(f"{name} has no version to go back to.", hint="Promote one.")
        aliases = {CHAMPION: held.aliases[PREVIOUS], PREVIOUS: held.aliases[CHAMPION]}
        return self._keep(
            replace(held, aliases=aliases, canary_share=0.0), aliases[CHAMPION], f"rollback {reason}", actor
        )

    def delete(self, name: str, version: str, *, actor: str) -> None:
        held = self.models.model(name)
        if version not in {one.version for one in held.versions}:
            raise InputError(f"{name} has no version {version!r}.")
        if version in held.aliases.values():
            raise BusyError(f"An alias points to version {version}.")
        versions = tuple(one for one in held.versions if one.version != version)
        self._keep(replace(held, versions=versions), version, "delete", actor)

    def _keep(
        self, model: RegisteredModel, version: str, action: str, actor: str, *, forced: str = ""
    ) -> FakePromotion:
        self.models.held[model.name] = model
        self.audit.write(actor, action, f"{model.name}@{version}")
        return FakePromotion(
            model.name, version, model.aliases, model.canary_share, forced, self.refuses if forced else ()
        )


class FakeDoor:
    """Lets in who bears `admin`, `read` or `infer`."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: AsgiScope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            word = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1").removeprefix("Bearer ")
            if word not in set(Scope):
                await refusal(scope["path"], 401, "Incorrect or missing API key.")(scope, receive, send)
                return
            scope[CALLER] = Caller(f"key-{word}", frozenset({Scope(word)}))
        await self.app(scope, receive, send)


@dataclass
class Api:
    """The application with its parts. `orders` are obeyed by the stand-in for `moestro` until they end it."""

    home: Home
    fleet: FakeFleet = field(default_factory=FakeFleet)
    models: FakeModels = field(default_factory=FakeModels)
    audit: FakeAudit = field(default_factory=FakeAudit)

    def __post_init__(self) -> None:
        self.promotions = FakePromotions(self.models, self.audit)
        program = self.home.path / "program.py"
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(PROGRAM)
        self.runs = Lifecycles(self.home, command=(sys.executable, "-S", "-E", str(program)))
        self.feeds = Feeds(self.runs, heartbeat=0.2)
        self.app = self.made()

    def made(self) -> FastAPI:
        app = FastAPI(docs_url=None, redoc_url=None)
        app.include_router(inventory(self.home, self.fleet))
        parts = ManagementParts(
            home=self.home, fleet=self.fleet, models=self.models, promotions=self.promotions, audit=self.audit
        )
        app.include_router(management(parts))
        app.include_router(lifecycles(parts, self.runs, self.feeds))
        _add_models(app)
        _add_refusals(app)
        describe(app)
        app.add_middleware(FakeDoor)
        return app

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


def _add_models(app: FastAPI) -> None:
    """Stand-ins for what the proxy answers."""

    @app.get("/v1/models", tags=["models"])
    def models() -> ModelList:
        return ModelList(data=(ModelCard(id="assistant", created=0, root="compress/c", max_model_len=512),))

    async def forward(request: Request) -> dict[str, Any]:
        kind = "chat.completion" if "chat" in request.url.path else "text_completion"
        return {"id": "1", "object": kind, "created": 0, "model": "assistant", "choices": []}

    for path in ("/v1/completions", "/v1/chat/completions"):
        app.post(path, tags=["models"], response_model=None, operation_id=path)(forward)


def _add_refusals(app: FastAPI) -> None:
    @app.exception_handler(MoestroError)
    async def mistake(_request: Request, error: MoestroError) -> JSONResponse:
        return api_error(error)

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> JSONResponse:
        return refusal(request.url.path, error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        return refusal(request.url.path, 400, f"{where}: {first['msg']}")


@pytest.fixture
def api(built_home: Home) -> Iterator[Api]:
    made = Api(built_home)
    yield made
    for started in made.runs.summaries(limit=1000):
        made.runs.stop(started.id)


@pytest.fixture
def url(api: Api) -> Iterator[str]:
    """The API over a real socket, where streams are streams."""
    with serving(api.app, listen("127.0.0.1", 0)) as address:
        yield address


@pytest.fixture
def bearing(url: str) -> Iterator[Callable[[str], httpx.Client]]:
    """Clients with a key of the given scope."""
    made: list[httpx.Client] = []

    def client(word: str) -> httpx.Client:
        made.append(
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {word}"}, timeout=30, trust_env=False)
        )
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
def fake_replica() -> type[FakeReplica]:
    return FakeReplica
