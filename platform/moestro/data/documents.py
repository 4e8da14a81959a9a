"""`Document` and what is decided by a text alone: its normal form, its id, its side of the split, its place."""

import hashlib
import unicodedata
from dataclasses import dataclass

from moestro.errors import InputError

HASH_RANGE = 2**256


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a domain. `held_out` is set where the source decides the side, as tasks do by the prompt."""

    text: str
    origin: str
    held_out: bool | None = None


def text_id(text: str) -> str:
    """SHA-256 of the text in UTF-8 (hex)."""
    return hashlib.sha256(text.encode()).hexdigest()


def is_held_out(identity: str, fraction: float) -> bool:
    """Whether the text with this id is held out: its id, read as a number in [0, 1), lies below `fraction`."""
    return int(identity, 16) < fraction * HASH_RANGE


def place(identity: str, seed: int) -> bytes:
    """Sort key of a seeded shuffle that depends on each text alone; unrelated to the side `is_held_out` chooses."""
    return hashlib.sha256(f"order:{seed}:{identity}".encode()).digest()


def normalise(text: str, *, origin: str) -> str:
    """`text` with NFC characters, Unix line ends, no white space at line ends and one newline at its end.

    A text of white space alone becomes empty. Raises `InputError` naming `origin` for a text that is not Unicode.
    """
    text = text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"{origin}: the text holds half a surrogate pair ({text[error.start]!r}) and cannot be encoded.",
            hint="Write the file again with valid Unicode escapes.",
        ) from None
    lines = [line.rstrip() for line in unicodedata.normalize("NFC", text).split("\n")]
    body = "\n".join(lines).strip("\n")
    return body + "\n" if body else ""
