"""`Checkpoint`: what rules look at, each part read when it is first asked for.

From headers: every stored tensor, by the names of its layout; from the config: the tensors transformers builds a model
of, without memory for them. Weights are read in blocks, tensor after tensor.
E experts, F intermediate, V vocabulary.
"""

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

from transformers.core_model_loading import revert_weight_conversion

from moestro.data.tokenizer import load_tokenizer
from moestro.errors import InputError
from moestro.linting.scan import Scan, scan
from moestro.linting.spelling import canonical
from moestro.models.checkpoint import UNUSABLE, is_quantised, meta_model, parse_config
from moestro.models.files import GENERATION_CONFIG, ORIGINS, TOKENIZERS, read_config, read_json
from moestro.models.layouts import DRAFT_LAYERS, LAYOUTS, Layout, layer_part
from moestro.models.weights import StoredTensor, StoredWeights

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
PREDICTING_PART = "eh_proj.weight"
"""What a layer that drafts further tokens has and no other."""


@dataclass(frozen=True)
class ExpertSizes:
    """What the stored tensors say about experts, whatever the config does."""

    num_experts: int | None
    """E, if all layers agree."""
    widths: frozenset[int]
    """F of every expert that has one."""


class Checkpoint:
    """A folder with a Mixture-of-Experts. Raises `InputError` if there is no config.json to be read."""

    def __init__(self, folder: Path, *, progress: Callable[[int, int], None] = lambda _done, _total: None) -> None:
        self.folder = folder
        self.progress = progress
        """Told bytes of weights read, and bytes in all."""
        self.parsed = read_config(folder)
        """config.json as it stands."""
        self.model_type: str = self.parsed["model_type"]
        self.layout: Layout | None = LAYOUTS.get(self.model_type)

    @property
    def quantised(self) -> bool:
        """Whether the config describes quantised weights, whose names and shapes are not those of the model."""
        return is_quantised(self.parsed)

    @property
    def own(self) -> Layout:
        """The layout, for rules that are run only where there is one."""
        assert self.layout is not None
        return self.layout

    @cached_property
    def config(self) -> Any:
        """The transformers config; raises `InputError` if there is none for config.json."""
        return parse_config(self.folder, self.parsed)

    @property
    def text(self) -> Any:
        """The part of the config that describes the language model: all of it, where nothing else is described."""
        return self.config.get_text_config()

    @cached_property
    def stored(self) -> StoredWeights:
        """Every tensor as it is stored."""
        return StoredWeights(self.folder)

    @cached_property
    def _canonical(self) -> tuple[dict[str, StoredTensor], dict[str, tuple[str, ...]]]:
        known = self.layout if not self.quantised else None
        return canonical(self.stored, known) if known else (dict(self.stored), {})

    @property
    def weights(self) -> dict[str, StoredTensor]:
        """Every tensor by the name of the layout that it stands for."""
        return self._canonical[0]

    @property
    def spelled(self) -> dict[str, tuple[str, ...]]:
        """What is stored under another name, and the names it stands for."""
        return self._canonical[1]

    @cached_property
    def layers(self) -> dict[int, set[str]]:
        """The parts that are stored of each layer, by its number."""
        found: dict[int, set[str]] = {}
        for name in self.weights:
            if place := layer_part(name):
                found.setdefault(place[0], set()).add(place[1])
        return found

    @cached_property
    def predicting_layers(self) -> frozenset[int]:
        """Stored layers behind the last one that predict further tokens, as the config declares them."""
        last = int(self.text.num_hidden_layers)
        declared = [getattr(self.text, field, 0) for field in DRAFT_LAYERS]
        count = max(value if isinstance(value, int) else 0 for value in declared)
        numbers = self.layers.keys() & set(range(last, last + count))
        return frozenset(number for number in numbers if not self.layout or PREDICTING_PART in self.layers[number])

    @cached_property
    def layers_behind(self) -> frozenset[int]:
        """Stored layers that the config does not count and does not declare to predict further tokens."""
        last = int(self.text.num_hidden_layers)
        return frozenset(number for number in self.layers if number >= last) - self.predicting_layers

    @cached_property
    def _of_all_layers(self) -> dict[str, tuple[int, ...]] | None:
        """What is expected were all stored layers the model's; None if they do not make up a whole one."""
        if self.layers.keys() != set(range(len(self.layers))) or self.predicting_layers:
            return None
        try:
            config = type(self.config).from_dict(with_layers(self.parsed, len(self.layers)))
            expected = self._expected(config)
        except (InputError, *UNUSABLE):
            return None
        missing = {name for name, shape in expected.items() if prod(shape)} - self.weights.keys()
        places = [place for name in missing if not name.endswith("bias") and (place := layer_part(name))]
        return None if any(layer in self.layers_behind for layer, _ in places) else expected

    @property
    def layers_to_count(self) -> int | None:
        """How many layers are stored, if they are more than the config counts and make up a whole model."""
        return len(self.layers) if self.layers_behind and self._of_all_layers else None

    @cached_property
    def expected(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor transformers would save of the model, were the sizes those of what is stored.

        Raises `InputError` if transformers cannot build one.
        """
        told = self._expected(self.config)
        longer = self._of_all_layers if not self.quantised and self.layers_behind else None
        return longer or told

    def _expected(self, config: Any) -> dict[str, tuple[int, ...]]:
        config = copy.deepcopy(config)
        text = config.get_text_config()
        for field, value in self.stored_sizes.items():
            setattr(text, field, value)
        if isinstance(text.pad_token_id, int) and text.pad_token_id >= text.vocab_size:
            text.pad_token_id = None  # a rule of its own tells
        model = meta_model(self.folder, config)
        state = revert_weight_conversion(model, model.state_dict())
        tied = model.all_tied_weights_keys if config.tie_word_embeddings else {}
        return {name: tuple(tensor.shape) for name, tensor in state.items() if name not in tied}

    @cached_property
    def stored_sizes(self) -> dict[str, int]:
        """Config fields whose value the stored tensors tell without doubt."""
        sizes: dict[str, int] = {}
        if self.quantised:
            return sizes
        if EMBEDDING in self.weights and len(self.weights[EMBEDDING].shape) == 2:
            sizes["vocab_size"] = self.weights[EMBEDDING].shape[0]
        if self.layout and self.experts.num_experts:
            sizes[self.layout.num_experts] = self.experts.num_experts
        if self.layout and self.experts.widths and not self.layout.shared_counts_experts:
            sizes[self.layout.expert_width] = max(self.experts.widths)
        return sizes

    @cached_property
    def experts(self) -> ExpertSizes:
        """Number and width of the stored experts."""
        layout, counts, widths = self.own, set(), set()
        if self.quantised:
            return ExpertSizes(None, frozenset())
        template = layout.experts.get("gate_up_proj") or layout.experts["gate_proj"]
        found: dict[str, set[int]] = {}
        for name, match in matches(template, self.weights):
            shape = self.weights[name].shape
            if len(shape) != (3 if layout.fused else 2) or int(match["layer"]) in self.predicting_layers:
                continue
            found.setdefault(match["layer"], set()).update(range(shape[0]) if layout.fused else {int(match["expert"])})
            widths.add(shape[1] // 2 if layout.fused else shape[0])
        for layer, present in found.items():
            router = self.weights.get(layout.router.format(layer=layer))
            rows = router.shape[0] if router and len(router.shape) == 2 else 0
            counts.add(rows if present == set(range(rows)) else 0)
        return ExpertSizes(counts.pop() if len(counts) == 1 and counts != {0} else None, frozenset(widths))

    @cached_property
    def sparse_layers(self) -> list[int]:
        """Layers that have a router, by the config."""
        return sorted(int(match["layer"]) for _, match in matches(self.own.router, self.expected))

    @cached_property
    def num_experts(self) -> int:
        """Routed experts per layer: those that are stored, or else those the config tells of."""
        return self.experts.num_experts or int(getattr(self.config, self.own.num_experts))

    @cached_property
    def scan(self) -> Scan:
        """What reading all weights tells."""
        return scan(self.weights, self.progress)

    @cached_property
    def tokenizer(self) -> Any | None:
        """The tokenizer, None without one; raises `InputError` if it cannot be read."""
        there = any((self.folder / name).is_file() for name in TOKENIZERS)
        return load_tokenizer(self.folder) if there else None

    @cached_property
    def generation(self) -> Mapping[str, Any]:
        """generation_config.json, empty without one."""
        path = self.folder / GENERATION_CONFIG
        content = read_json(path) if path.is_file() else {}
        return content if isinstance(content, dict) else {}

    @property
    def has_origins(self) -> bool:
        """Whether it says what its experts were made from, as Moestro's own do."""
        return (self.folder / ORIGINS).is_file()

    def expert(self, layer: int, number: int) -> dict[str, StoredTensor]:
        """The stored projections of a routed expert, where experts lie apart."""
        names = {part: name.format(layer=layer, expert=number) for part, name in self.own.experts.items()}
        return {part: self.weights[name] for part, name in names.items() if name in self.weights}


def with_layers(parsed: Mapping[str, Any], count: int) -> dict[str, Any]:
    """A parsed config.json with `count` layers, all of one kind where it lists their kinds and these agree."""
    changed = {**parsed, "num_hidden_layers": count}
    for field, kinds in parsed.items():
        if field.endswith("layer_types") and isinstance(kinds, list) and kinds and kinds == kinds[:1] * len(kinds):
            changed[field] = kinds[:1] * count
    return changed


def matches(template: str, names: Mapping[str, Any]) -> list[tuple[str, re.Match[str]]]:
    """The names that a template of `{layer}` and `{expert}` stands for, with both numbers."""
    pattern = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)").replace(r"\{expert\}", r"(?P<expert>\d+)")
    return [(name, match) for name in names if (match := re.fullmatch(pattern, name))]


def refused(read: Callable[[], Any]) -> InputError | None:
    """The error that reading a part of a checkpoint ends with, if it does."""
    try:
        read()
    except InputError as error:
        return error
    return None
