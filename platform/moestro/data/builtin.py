"""Text that every installation has: the standard library's sources, and English prose about Python and its packages.

Both are small (some 10 and 3 MB), so they are read whole; `identify_builtin` hashes exactly what is read.
"""

import email
import hashlib
import io
import os
import re
import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from moestro.data.documents import Document

# Directories without code worth learning from: other people's packages, tests, and what the build left behind.
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "lib-dynload"}
# Tables, and what is this machine's rather than Python's.
LEFT_OUT_FILES = {"pydoc_data/topics.py", "html/entities.py", "sitecustomize.py", "usercustomize.py"}
LEFT_OUT_PREFIXES = ("config-", "_sysconfigdata", "encodings/cp", "encodings/iso", "encodings/mac_", "encodings/koi8")
GENERATED = re.compile(rb"auto-?generated|generated (automatically|by|from|with)", re.IGNORECASE)
GENERATED_WITHIN = 1000

# Words that make up a third of English prose and hardly any of a table, a changelog of numbers or a code listing.
COMMON_WORDS = frozenset({
    "a", "all", "also", "an", "and", "any", "are", "as", "at", "be", "but", "by", "can", "for", "from", "has", "have",
    "if", "in", "is", "it", "its", "more", "not", "of", "on", "one", "or", "that", "the", "they", "this", "to", "use",
    "used", "we", "when", "which", "will", "with", "you", "your",
})  # fmt: skip
MIN_COMMON_SHARE = 0.2
MIN_PROSE = 400
# Long texts are divided, so that the few documents of a held-out side are like the rest.
PART = 4000
# Topics contain one another, and so do the descriptions of sister packages: a paragraph this long is used once.
MIN_REPEAT = 80


def stdlib_files() -> list[tuple[str, Path]]:
    """The standard library's modules, as (path relative to the library, path), sorted; tests and tables left out."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in LEFT_OUT_FOLDERS]
        for name in names:
            relative = (Path(folder) / name).relative_to(root).as_posix()
            skipped = relative in LEFT_OUT_FILES or relative.startswith(LEFT_OUT_PREFIXES)
            if name.endswith(".py") and not skipped:
                found.append((relative, Path(folder) / name))
    return sorted(found)


def stdlib() -> Iterator[Document]:
    """Each module of the standard library that nobody generated."""
    for relative, path in stdlib_files():
        content = path.read_bytes()
        if not GENERATED.search(content[:GENERATED_WITHIN]):
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            yield Document(content.decode(encoding), f"stdlib:{relative}")


def docs() -> Iterator[Document]:
    """The language reference's topics and the descriptions of the installed packages, in parts, no paragraph twice."""
    seen: set[str] = set()
    for origin, text in [*_topics(), *_descriptions()]:
        rest = without_repeats(text, seen)
        if is_prose(rest):
            for number, part in enumerate(parts(rest), 1):
                yield Document(part, f"{origin}:{number}")


def _topics() -> Iterator[tuple[str, str]]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield f"topic:{name}", clean_rst(text)


def _descriptions() -> Iterator[tuple[str, str]]:
    # Read as files from the one folder of installed packages: what importing Ray or importlib_metadata does to
    # `sys.path` and `importlib.metadata` in a process must not change what the corpus is.
    folders = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    found: dict[str, str] = {}
    for path in sorted(path for folder in folders for path in Path(folder).glob("*.dist-info/METADATA")):
        metadata = email.message_from_string(path.read_text(encoding="utf-8", errors="replace"))
        name = re.sub(r"[-_.]+", "-", metadata["Name"] or "").lower()
        # Moestro's own text must not change its corpora.
        if name and name != "moestro":
            found[name] = str(metadata.get_payload() or metadata["Description"] or "")
    for name, description in sorted(found.items()):
        yield f"package:{name}", clean_markup(description)


def identify_builtin(name: str) -> str:
    """Hash (hex) of everything the built-in source `name` reads, with the relative names it carries."""
    digest = hashlib.sha256()
    if name == "stdlib":
        for relative, path in stdlib_files():
            digest.update(f"{relative}:{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    else:
        for document in docs():
            digest.update(f"{document.origin}:{hashlib.sha256(document.text.encode()).hexdigest()}\n".encode())
    return digest.hexdigest()


def clean_rst(text: str) -> str:
    """`text` without the lines that only underline a heading."""
    return re.sub(r"^([*=\-~^#\"+])\1{2,}\s*$\n?", "", text, flags=re.MULTILINE)


def clean_markup(text: str) -> str:
    """A Markdown or RST description as plain text: code fences, HTML, images, badges, directives and targets go."""
    text = text.replace("\r\n", "\n")
    text = re.sub(r"^(```|~~~).*?^\1\s*$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\.\. .*(\n[ \t]+.*)*", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\[[^\]]+\]:.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"`([^`<]+?)\s*<[^>`]*>`_+", r"\1", text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"^\s*[|:\-+= ]{4,}\s*$", "", text, flags=re.MULTILINE)
    return re.sub(r"\n{3,}", "\n\n", clean_rst(text)).strip()


def is_prose(text: str) -> bool:
    """Whether `text` is long enough and mainly English sentences, by the share of the commonest words."""
    words = re.findall(r"[A-Za-z']+", text.lower())
    common = sum(word in COMMON_WORDS for word in words)
    return len(text) >= MIN_PROSE and common >= MIN_COMMON_SHARE * len(words)


def without_repeats(text: str, seen: set[str]) -> str:
    """`text` without the long paragraphs in `seen`, which grows by the others."""
    kept = []
    for paragraph in text.split("\n\n"):
        key = " ".join(paragraph.split())
        if len(key) < MIN_REPEAT or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept)


def parts(text: str) -> Iterator[str]:
    """`text` cut at blank lines into parts of at most `PART` characters; a longer paragraph is a part of its own."""
    part: list[str] = []
    size = 0
    for paragraph in text.split("\n\n"):
        if part and size + len(paragraph) > PART:
            yield "\n\n".join(part)
            part, size = [], 0
        part.append(paragraph)
        size += len(paragraph) + 2
    yield "\n\n".join(part)
