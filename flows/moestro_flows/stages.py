"""The one place where a stage meets Prefect: the lifecycle as a flow, each step as a task.

Prefect sees what runs, waits, fails and is reused; it neither caches nor persists results: the artifact store does.
A step is a task, not a sub-flow, since a synchronous sub-flow costs about a second (docs/adr/0007). Steps that do
not depend on one another run side by side.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

from moestro.artifacts import Artifact
from moestro.config import Config, load_lifecycle
from moestro.errors import noting
from moestro.execution import Step
from moestro.interrupts import interrupts_held
from moestro_flows.home import Home
from moestro_flows.lifecycle import walk
from moestro_flows.server import sign_own
from moestro_flows.session import Session
from moestro_flows.summary import figures, rows

Home.current().prepare()  # Prefect reads its settings once, when it is imported

from prefect import flow, task  # noqa: E402
from prefect.artifacts import create_markdown_artifact, create_table_artifact  # noqa: E402
from prefect.cache_policies import NO_CACHE  # noqa: E402
from prefect.client.orchestration import get_client  # noqa: E402
from prefect.futures import PrefectFuture  # noqa: E402
from prefect.states import Completed, State  # noqa: E402

_OPENED: ContextVar[Session | None] = ContextVar("opened session", default=None)


def run_lifecycle(config_path: Path, name: str) -> str:
    """Run the flow from a terminal. Meanwhile Prefect's ephemeral server starts, if there is to be one."""
    home = Home.current()
    with ThreadPoolExecutor(1) as beside:
        server = beside.submit(_start_server, home)
        with _opened(home, config_path) as session:
            server.result()
            token = _OPENED.set(session)
            try:
                return lifecycle(str(config_path), name=name)
            finally:
                _OPENED.reset(token)


def _start_server(home: Home) -> None:
    """Start the ephemeral server, kept from the terminal's Ctrl-C. If this run cannot end it, the next one does."""
    sign_own(home)
    with interrupts_held(), get_client(sync_client=True) as client:
        client.hello()


@contextmanager
def _opened(home: Home, config_path: Path) -> Iterator[Session]:
    """A session with its cluster, which local stages need not wait for."""
    with Session.open(home, load_lifecycle(config_path)) as session:
        if session.to_run:
            # It puts another module in its own place while it is imported: a second thread would get the empty one.
            import_module("transformers")
        if session.needs_cluster:
            threading.Thread(target=import_module, args=("moestro.mixing",), daemon=True).start()
            session.cluster.connect(workers=len(session.config.data.names("expert")))
        yield session


@flow(name="lifecycle", flow_run_name="{name}", validate_parameters=False)
def lifecycle(config_path: str, name: str = "lifecycle") -> str:  # noqa: ARG001  (`name` names the flow run)
    """Run the lifecycle that the YAML file describes; returns the run's id, under which its record lies in the home."""
    if session := _OPENED.get():
        return _run(session)
    with _opened(Home.current(), Path(config_path)) as session:
        return _run(session)


def _run(session: Session) -> str:
    futures = _submit_all(session)
    try:
        _wait(session, futures)
    except BaseException as error:
        with noting(error):
            session.close()  # Prefect waits for its threads before the flow ends, and they for the cluster
        raise
    run = session.finish()
    create_table_artifact(rows(run, session.home.store), key="summary", description=f"Steps of {run.name}")
    return run.id


def _submit_all(session: Session) -> list[PrefectFuture[Any]]:
    """Every step as a task, in the order of the walk. No branch begins before the text of all domains is counted."""
    futures: list[PrefectFuture[Any]] = []
    tokens: dict[str, PrefectFuture[Any]] = {}

    def submit(name: str, stage: str, config: Config, **inputs: Any) -> PrefectFuture[Any]:
        text = dict(tokens) if stage == "branch" else None
        futures.append(_task(session, name, stage, config).submit(inputs, text))
        if stage == "tokens":
            tokens[name.removeprefix("tokens ")] = futures[-1]
        return futures[-1]

    walk(session.config, submit)
    return futures


def _wait(session: Session, futures: list[PrefectFuture[Any]]) -> None:
    """Wait for all steps; raises the error of the step that failed first, not those of the steps it stopped."""
    for future in futures:
        future.wait()
        if session.failure is not None:
            raise session.failure
        future.result()


def _task(session: Session, name: str, stage: str, config: Config) -> Any:
    """The Prefect task for one step."""

    @task(name=stage, task_run_name=name, cache_policy=NO_CACHE, persist_result=False)
    def perform(inputs: dict[str, Any], text: dict[str, Artifact] | None) -> State[Artifact]:
        step, artifact = session.perform(name, Step(stage, config, inputs), text=text)
        if not step.reused:
            create_markdown_artifact(_page(artifact, step.mlflow_run_id), key=f"{stage}-{artifact.fingerprint[:16]}")
        return Completed(name="Reused" if step.reused else "Completed", data=artifact)

    return perform


def _page(artifact: Artifact, mlflow_run_id: str) -> str:
    """What Prefect shows of a step's artifact."""
    record = artifact.record
    lines = [f"**{artifact.stage}** `{artifact.fingerprint[:16]}`", "", figures(record), "", f"`{artifact.path}`"]
    return "\n".join(
        [*lines, "", f"MLflow run `{mlflow_run_id}`", "", f"{record.size / 1e6:.1f} MB, {record.seconds:.1f} s"]
    )
