"""`Home`: the one folder everything of Moestro's lies under, and the environment that keeps its parts there and quiet.

    artifacts/ work/   the artifact store        runs/        one JSON record per lifecycle run
    registry.db        the SQLAlchemy registry   mlflow.db, mlflow/   MLflow's store and files
    prefect/           Prefect's database        logs/        what child processes print
    keys/              the gateway's API keys    peers/       environments of what benchmarks compare with
    configs/           lifecycles that may be started over the API, lifecycles/  those that were

Addresses in the environment win over the embedded parts: PREFECT_API_URL, RAY_ADDRESS, MLFLOW_TRACKING_URI,
MOESTRO_DATABASE_URL. The environment is read here and nowhere below.
"""

import os
import secrets
import tempfile
from dataclasses import dataclass
from pathlib import Path

from moestro.artifacts import ArtifactStore
from moestro.errors import ConfigError

DEFAULT = ".moestro"


@dataclass(frozen=True)
class Home:
    """The folder (absolute) and what is in it."""

    path: Path

    @classmethod
    def current(cls) -> "Home":
        """The home that MOESTRO_HOME names, `.moestro` in the working directory by default."""
        return cls(Path(os.environ.get("MOESTRO_HOME", DEFAULT)).expanduser().absolute())

    @property
    def store(self) -> ArtifactStore:
        """The artifacts."""
        return ArtifactStore(self.path)

    @property
    def runs(self) -> Path:
        """Folder of the lifecycle runs' records."""
        return self.path / "runs"

    @property
    def logs(self) -> Path:
        """Folder of child processes' output."""
        return self.path / "logs"

    @property
    def configs(self) -> Path:
        """Folder of the lifecycle configs that may be started over the gateway's API, put there by the operator."""
        return self.path / "configs"

    @property
    def lifecycles(self) -> Path:
        """Folder of the lifecycles that were started over the gateway's API, a folder each."""
        return self.path / "lifecycles"

    @property
    def lock(self) -> Path:
        """Held by the run that is using this home."""
        return self.path / "run.lock"

    @property
    def ray_address(self) -> str | None:
        """The Ray cluster to use; None starts one in place."""
        return os.environ.get("RAY_ADDRESS") or None

    @property
    def prefect_url(self) -> str | None:
        """The API of the Prefect server to use; None starts an ephemeral one."""
        return os.environ.get("PREFECT_API_URL") or None

    @property
    def database_url(self) -> str:
        """SQLAlchemy URL of the registry."""
        return os.environ.get("MOESTRO_DATABASE_URL") or f"sqlite:///{self.path / 'registry.db'}"

    @property
    def mlflow_uri(self) -> str:
        """Where MLflow tracks."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{self.path / 'mlflow.db'}"

    @property
    def mlflow_files(self) -> str:
        """Where MLflow's embedded store keeps files."""
        return (self.path / "mlflow").as_uri()

    def prepare(self) -> None:
        """Make the folder and set the environment of this process and its children. Call before importing Prefect,
        MLflow, Ray or vLLM: they read their settings once. Raises `ConfigError` if the folder cannot be made."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.logs.mkdir(exist_ok=True)
            tempfile.TemporaryFile(dir=self.path).close()
        except OSError as error:
            raise ConfigError(
                f"{self.path} cannot be the home folder ({error.strerror}).", hint="Point MOESTRO_HOME elsewhere."
            ) from None
        for name, value in self.environment().items():
            os.environ.setdefault(name, value)
        if self.ray_address is None:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
            os.environ.setdefault("RAY_AUTH_TOKEN_PATH", str(self._ray_token()))

    def _ray_token(self) -> Path:
        """The secret of the Ray cluster that is started in place, made when it is first needed."""
        path = self.path / "ray_token"
        if not path.exists():
            temporary = path.with_suffix(f".{os.getpid()}")
            temporary.touch(mode=0o600)
            temporary.write_text(secrets.token_hex(32))
            temporary.replace(path)
        return path

    def environment(self) -> dict[str, str]:
        """Settings under which all parts stay in this folder and connect to nothing outside this machine."""
        prefect = self.path / "prefect"
        return {
            "PREFECT_HOME": str(prefect),
            "PREFECT_LOCAL_STORAGE_PATH": str(prefect / "storage"),
            "PREFECT_MEMO_STORE_PATH": str(prefect / "memo_store.toml"),
            "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_API_BLOCKS_REGISTER_ON_START": "false",
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
            "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",
            "DO_NOT_TRACK": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
            "MLFLOW_TRACKING_URI": self.mlflow_uri,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_COLOR_PREFIX": "0",
            "RAY_raylet_start_wait_time_s": "120",  # Ray's default of 30 is too little on a busy machine
            "RAY_worker_niceness": "0",  # Ray's default lets every other process go before its workers
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_CPU_KVCACHE_SPACE": "1",
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "HF_HUB_OFFLINE": "1",
            "RAY_ENABLE_AUTO_CONNECT": "0",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
            "TOKENIZERS_PARALLELISM": "true",
        }
