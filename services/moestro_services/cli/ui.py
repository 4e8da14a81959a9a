"""`moestro ui`: gateway, MLflow and Prefect together on loopback ports, until Ctrl-C."""

import json as json_format
import sys
from typing import Annotated

import typer
from rich.console import Console

from moestro_flows.home import Home
from moestro_services.cli.output import Json, table
from moestro_services.cli.serve import asked_keys
from moestro_services.cli.stopping import until_stopped

Port = Annotated[int, typer.Option(help="Port; 0 takes a free one.", min=0, max=65535)]


def ui(
    gateway_port: Port = 8000,
    mlflow_port: Port = 5000,
    prefect_port: Port = 4200,
    model: Annotated[
        bool, typer.Option(help="Serve behind the gateway what `moestro serve` would, if there is anything.")
    ] = True,
    no_auth: Annotated[bool, typer.Option("--no-auth", help="Let the gateway ask for no keys.")] = False,
    json: Json = False,
) -> None:
    """Run gateway, MLflow and Prefect until Ctrl-C. What the environment names by an address is not started."""
    from moestro_services.dashboards import Ports, dashboards
    from moestro_services.gateway.assembly import Policy
    from moestro_services.gateway.watch import RollbackRule

    home = Home.current()
    console = Console(stderr=True)
    policy = Policy(keys=asked_keys(home, no_auth=no_auth), rule=RollbackRule())
    ports = Ports(gateway=gateway_port, mlflow=mlflow_port, prefect=prefect_port)
    home.prepare()
    with until_stopped(console), dashboards(home, ports, model=model, policy=policy, say=console.print) as running:
        if json:
            addresses = {name.lower(): url for name, url in running.addresses.items()}
            sys.stdout.write(json_format.dumps(addresses) + "\n")
            sys.stdout.flush()
        else:
            Console().print(table("", ["", "address"], [[*item] for item in running.addresses.items()]))
            Console().print("Ctrl-C stops all.")
        running.watch()
