#!/usr/bin/env bash
# Run a lifecycle as a job on a Ray cluster: `infra/ray-job.sh CONFIG.yaml`.
#
#   RAY_ADDRESS    the cluster's dashboard, http://HEAD:8265
#   MOESTRO_HOME   a folder that all machines of the cluster share
#
# Addresses of Prefect, MLflow and the registry are passed on if they are set. Moestro must be installed on the
# cluster's machines: only the config file is shipped, never the working directory.
set -euo pipefail

config=${1:?usage: infra/ray-job.sh CONFIG.yaml}
: "${RAY_ADDRESS:?the dashboard of the Ray cluster, http://HEAD:8265}"
: "${MOESTRO_HOME:?a folder that all machines of the cluster share}"

folder=$(mktemp -d)
trap 'rm -r "$folder"' EXIT
cp "$config" "$folder/lifecycle.yaml"

runtime_env=$(python3 - <<'PYTHON'
import json, os
names = ("MOESTRO_HOME", "PREFECT_API_URL", "MLFLOW_TRACKING_URI", "MOESTRO_DATABASE_URL")
print(json.dumps({"env_vars": {name: os.environ[name] for name in names if os.environ.get(name)}}))
PYTHON
)
ray job submit --working-dir "$folder" --runtime-env-json "$runtime_env" -- moestro run lifecycle.yaml --no-ask
