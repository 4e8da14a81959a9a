"""`moestro deploy`: a checkpoint passes the gates and becomes a version of a model."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from moestro.artifacts import Artifact
from moestro.config import Config, DeployConfig, LifecycleConfig, read_yaml, validate
from moestro.errors import ConfigError, GateError, InputError
from moestro_flows.home import Home
from moestro_services.audit import Audit
from moestro_services.catalog import Catalog
from moestro_services.cli.output import Json, emit
from moestro_services.cli.promote import Force, actor, promotions, state, told
from moestro_services.cli.stage import run_in, stage_config, stage_inputs


def deploy(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A Hugging Face directory, an artifact's folder, a stage (newest) or fingerprint."),
    ],
    config: Annotated[
        Path, typer.Option("--config", help="YAML file with the deploy stage's config, or a whole lifecycle.")
    ],
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--tokens",
            help="DOMAIN=ARTIFACT, a folder or fingerprint; repeat. Default: those of the config's lifecycle.",
        ),
    ] = None,
    force: Force = "",
    cpus: Annotated[int | None, typer.Option("--cpus", help="Cores to use.", min=1)] = None,
    json: Json = False,
) -> None:
    """Take a checkpoint through the deployment gates and register what passes: first as champion, then as challenger.

    A checkpoint from outside is copied into the home, so that what is served stays as it was measured.
    """
    home = Home.current()
    home.prepare()
    settings = _forced(stage_config("deploy", config), force)
    pairs = [_pair(home, item) for item in tokens] if tokens else list(_own_tokens(home, config))
    inputs = stage_inputs("deploy", [f"model={_folder(home, checkpoint)}", *pairs])
    artifact = _pass_gates(home, settings, inputs, force, cpus)
    done = promotions(home).register(artifact, actor=actor())
    data = told(done) | {"fingerprint": artifact.fingerprint, "result": artifact.record.result}
    label = f"{done.name}@{done.version}"
    first = f"{label} is registered." if done.changed else f"{label} is this deployment already; nothing was changed."
    emit(data, lambda: Text(f"{first}\n{state(done)}"), json=json)


def _forced(config: Config, reason: str) -> DeployConfig:
    """The stage's config with a reason to overrule its gates."""
    assert isinstance(config, DeployConfig)
    if not reason or "force" not in DeployConfig.model_fields:
        return config
    return validate(DeployConfig, config.model_dump(mode="json") | {"force": reason}, where="moestro deploy --force")


def _folder(home: Home, checkpoint: str) -> Path:
    return Path(checkpoint) if Path(checkpoint).exists() else Catalog(home).published(checkpoint).path


def _pair(home: Home, given: str) -> str:
    """`DOMAIN=ARTIFACT` as the stage takes it."""
    domain, equals, artifact = given.partition("=")
    return f"tokens/{domain}={_folder(home, artifact)}" if equals and artifact else f"tokens/{given}"


def _own_tokens(home: Home, path: Path) -> list[str]:
    """`tokens/DOMAIN=FOLDER` of the lifecycle in the file `path`, as this home has them."""
    from moestro_flows.plan import Plan

    data = read_yaml(path)
    if not isinstance(data, dict) or "domains" not in (data.get("data") or {}):
        raise ConfigError(
            f"{path} is no lifecycle, so it does not say what text to measure with.",
            hint="Give --tokens DOMAIN=FOLDER for each domain.",
        )
    plan = Plan.of(validate(LifecycleConfig, data, where=str(path)), home.store)
    found = {step.name.removeprefix("tokens "): step for step in plan.steps if step.stage == "tokens"}
    missing = [domain for domain, step in found.items() if step.action == "run"]
    if missing:
        raise InputError(
            f"{home.path} has no tokens of {', '.join(missing)} for {path}.",
            hint=f"`moestro run {path}` makes them; or give --tokens DOMAIN=FOLDER for each domain.",
        )
    return [f"tokens/{domain}={home.store.folder('tokens', step.fingerprint)}" for domain, step in found.items()]


def _pass_gates(home: Home, config: DeployConfig, inputs: dict[str, Any], force: str, cpus: int | None) -> Artifact:
    """The deployment of the checkpoint, both of them in the home's store; what the gates said is in the audit log."""
    from moestro.registry import connect
    from moestro_services.adopting import adopt

    model: Artifact = inputs["model"]
    audit, who = Audit.of(home), actor()
    about = {"checkpoint": f"{model.stage}/{model.fingerprint}", "force": force}
    try:
        artifact = run_in(home.store, "deploy", config, inputs, cpus=cpus)
    except GateError as error:
        audit.write(who, "deploy", config.name, outcome="refused", message=error.message, **about)
        raise
    kept = adopt(home.store, model)
    registry = connect(home.database_url)
    for made in (kept, artifact):
        registry.index_artifact(made.path, made.record)
    registry.close()
    audit.write(who, "deploy", config.name, outcome="passed", fingerprint=artifact.fingerprint, **about)
    return artifact
