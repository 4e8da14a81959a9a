"""What is checked: one file a group of rules, `RULES` is the registry. They are run, and mended, in this order."""

from moestro.linting.rule import Rule
from moestro.linting.rules.architecture import (
    ACTIVATION,
    ARCHITECTURES,
    QUANTISED,
    UNKNOWN_ARCHITECTURE,
    UNUSABLE_CONFIG,
)
from moestro.linting.rules.attention import (
    CPU_HEAD_SIZE,
    DROPPED_ATTENTION_BIASES,
    IGNORED_HEAD_SIZE,
    IMPOSSIBLE_HEADS,
    MISSING_QKV_BIASES,
    OLMOE_ATTENTION,
)
from moestro.linting.rules.embeddings import MISSING_HEAD, PAD_TOKEN, SECOND_HEAD, TIED_HEAD, VOCABULARY_SIZE
from moestro.linting.rules.experts import EXPERT_COUNT, EXPERT_WIDTH, ORIGINS_MISMATCH, UNEVEN_EXPERTS, ZERO_EXPERTS
from moestro.linting.rules.files import DAMAGED_FILES, INDEX_MISMATCH, NO_SAFETENSORS, STRAY_FILES
from moestro.linting.rules.gates import IGNORED_RENORMALISATION, UNNORMALISED_COPIES, UNNORMALISED_GATES
from moestro.linting.rules.layers import LAYER_COUNT, PREDICTING_LAYERS
from moestro.linting.rules.numbers import DOUBLE_PRECISION, NOT_FINITE, STORED_TYPES, UNSCALED_INTEGERS
from moestro.linting.rules.rotary import (
    DEFAULT_ROTATION,
    DEFAULT_THETA,
    PARTIAL_ROTATION,
    ROTATION_BY_LENGTH,
    ROTATION_FIELDS,
    TWO_ROTATIONS,
)
from moestro.linting.rules.routing import (
    IMPOSSIBLE_CHOICE,
    MISSING_CORRECTION_BIAS,
    SMALL_GROUPS,
    UNREACHABLE_EXPERTS,
)
from moestro.linting.rules.shared import FOREIGN_SHARED_EXPERT, NO_SHARED_EXPERT
from moestro.linting.rules.tensors import (
    EMPTY_TENSORS,
    EXPERT_NAMES,
    MISSING_TENSORS,
    SHAPES,
    UNREAD_BIASES,
    UNREAD_TENSORS,
)
from moestro.linting.rules.tokens import END_OF_TEXT, LARGE_TOKENIZER, MISSING_TOKENIZER, SPECIAL_TOKENS
from moestro.linting.rules.windows import SLIDING_WINDOWS

RULES: dict[str, Rule] = {
    rule.name: rule
    for rule in (
        NO_SAFETENSORS,
        DAMAGED_FILES,
        STRAY_FILES,
        INDEX_MISMATCH,
        UNUSABLE_CONFIG,
        UNKNOWN_ARCHITECTURE,
        QUANTISED,
        ARCHITECTURES,
        ACTIVATION,
        EXPERT_NAMES,
        LAYER_COUNT,
        PREDICTING_LAYERS,
        EXPERT_COUNT,
        EXPERT_WIDTH,
        UNEVEN_EXPERTS,
        VOCABULARY_SIZE,
        SHAPES,
        MISSING_TENSORS,
        UNREAD_TENSORS,
        UNREAD_BIASES,
        EMPTY_TENSORS,
        NO_SHARED_EXPERT,
        FOREIGN_SHARED_EXPERT,
        IGNORED_RENORMALISATION,
        UNNORMALISED_COPIES,
        UNNORMALISED_GATES,
        IMPOSSIBLE_CHOICE,
        SMALL_GROUPS,
        MISSING_CORRECTION_BIAS,
        UNREACHABLE_EXPERTS,
        ZERO_EXPERTS,
        MISSING_QKV_BIASES,
        DROPPED_ATTENTION_BIASES,
        IMPOSSIBLE_HEADS,
        IGNORED_HEAD_SIZE,
        CPU_HEAD_SIZE,
        SLIDING_WINDOWS,
        OLMOE_ATTENTION,
        PARTIAL_ROTATION,
        DEFAULT_ROTATION,
        DEFAULT_THETA,
        TWO_ROTATIONS,
        ROTATION_BY_LENGTH,
        ROTATION_FIELDS,
        TIED_HEAD,
        SECOND_HEAD,
        MISSING_HEAD,
        NOT_FINITE,
        UNSCALED_INTEGERS,
        DOUBLE_PRECISION,
        STORED_TYPES,
        MISSING_TOKENIZER,
        LARGE_TOKENIZER,
        PAD_TOKEN,
        SPECIAL_TOKENS,
        END_OF_TEXT,
        ORIGINS_MISMATCH,
    )
}
