"""`Configs`: the lifecycle configs that the operator put into the home, known to requests by their names alone."""

import re
from pathlib import Path

from moestro.config import LifecycleConfig, load_lifecycle
from moestro.errors import ConfigError, InputError
from moestro_services.gateway.lifecycles_schemas import CONFIG_PATTERN, ConfigDetail, ConfigSummary

SUFFIX = ".yaml"


class Configs:
    """The files `NAME.yaml` in `folder`, at the time of asking."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def _files(self) -> dict[str, Path]:
        found = {path.name.removesuffix(SUFFIX): path for path in sorted(self.folder.glob(f"*{SUFFIX}"))}
        return {name: path for name, path in found.items() if re.fullmatch(CONFIG_PATTERN, name) and path.is_file()}

    def _file(self, name: str) -> Path:
        files = self._files()
        if name not in files:
            raise InputError(
                f"There is no config {name!r}.", hint=f"There are: {', '.join(files)}." if files else "There are none."
            )
        return files[name]

    def summaries(self) -> list[ConfigSummary]:
        """All of them by name; one that cannot be read comes with the reason."""
        return [self._summary(name, path) for name, path in self._files().items()]

    def load(self, name: str) -> LifecycleConfig:
        """The config of that name; raises `InputError` if there is none, `ConfigError` if it is not right."""
        return load_lifecycle(self._file(name))

    def detail(self, name: str) -> ConfigDetail:
        """The config of that name with all its fields; raises as `load` does."""
        path = self._file(name)
        config = load_lifecycle(path)
        return ConfigDetail(name=name, description=_description(path), config=config.model_dump(mode="json"))

    def _summary(self, name: str, path: Path) -> ConfigSummary:
        try:
            config = load_lifecycle(path)
        except ConfigError as error:
            return ConfigSummary(name=name, description="", error=error.message)
        return ConfigSummary(name=name, description=_description(path), domains=config.data.names())


def _description(path: Path) -> str:
    """The comment that the file begins with, in one line."""
    words = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        words.append(line.lstrip("#").strip())
    return " ".join(words).strip()
