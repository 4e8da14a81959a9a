"""The plan that the page on branching shows is a valid one, and is what the page says of it."""

import re
from pathlib import Path
from typing import Any

import yaml

from moestro.config import BranchConfig, LifecycleConfig, validate

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "branching.md"


def test_the_pages_plan_is_valid_and_does_what_the_page_says() -> None:
    blocks = re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    shown: dict[str, Any] = {key: value for block in blocks for key, value in yaml.safe_load(block).items()}
    shown["seed"]["training"] = {"steps": 1, "sequence_length": 256}
    shown["seed"]["model"] = {"max_position_embeddings": 1024}
    config = validate(LifecycleConfig, {"name": "shown", **shown}, where="branching.md")
    configs = config.branch_configs()
    assert {name: branch.type for name, branch in configs.items()} == {"code": "train", "law": "train", "med": "import"}
    code, law = configs["code"], configs["law"]
    assert isinstance(code, BranchConfig)
    assert isinstance(law, BranchConfig)
    assert (code.training.tokens, code.general_share) == (6_000_000_000, 0.25)
    assert (law.training.tokens, law.general_share) == (2_000_000_000, 0.05)
    assert code.training.optimizer == law.training.optimizer
    assert config.general_text("code") == ("web",)
    assert config.seed_text() == ("code", "law", "web")
