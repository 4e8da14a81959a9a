"""`moestro bench mixing`: time and memory of making experts, against the mergekit package on the same inputs.

Whole processes, from the start of the interpreter to its end, in interleaved rounds. How long importing takes is
measured in processes of the same rounds that import what the commands import, and do nothing else.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moestro.errors import ResourceError
from moestro_kernels.timing import Timing, ratio
from moestro_services.bench_mixing_rivals import (
    MERGEKIT,
    Rival,
    differing_experts,
    expert_tensors,
    make_inputs,
    mergekit,
    moestro,
)
from moestro_services.measured_process import Measured, measured
from moestro_services.peers import peer_environment

COUNTS = (4, 8)
REPEATS = 5
MIN_SPEEDUP = 1.0
MIN_SPEEDUP_OF_WORK = 2.0
MAX_MEMORY = 0.5
IMPORT = """
import contextlib, importlib, sys
for name in open(sys.argv[1]).read().split():
    with contextlib.suppress(ImportError, AttributeError):
        importlib.import_module(name)
"""
IMPORT_TIME = "import time:"
WARM_BYTES = 16 << 20


@dataclass
class Series:
    """One rival's rounds."""

    whole: list[Measured] = field(default_factory=list)
    imports: list[Measured] = field(default_factory=list)
    flushes: list[float] = field(default_factory=list)
    """Seconds, after each run, until the system had what it wrote on the disk."""

    @property
    def time(self) -> Timing:
        """Of the whole process."""
        return Timing(tuple(run.seconds for run in self.whole))

    @property
    def import_time(self) -> Timing:
        """Of the process that only imports."""
        return Timing(tuple(run.seconds for run in self.imports))

    @property
    def work_time(self) -> Timing:
        """The whole process less the imports of the same round."""
        return Timing(tuple(a.seconds - b.seconds for a, b in zip(self.whole, self.imports, strict=True)))

    @property
    def peak(self) -> int:
        """Largest of all rounds, in bytes."""
        return max(run.peak_bytes for run in self.whole)

    @property
    def anonymous_peak(self) -> int:
        """Largest of all rounds, in bytes."""
        return max(run.anonymous_bytes for run in self.whole)


def bench() -> dict[str, Any]:
    """Measure with 4 and with 8 experts: some minutes, and 11 GB in the folder for temporary files.

    The first time, mergekit is installed into an environment of its own in the home's folder `peers`.
    """
    python = peer_environment("mergekit", MERGEKIT)
    rows, bounds = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, max(COUNTS))
        for count in COUNTS:
            rivals = (moestro(folder), mergekit(folder, python))
            differing, tensors = prepared(folder, rivals, count)
            ours, theirs = rounds(folder, rivals, count)
            rows += list(_rows(count, ours, theirs))
            bounds += list(_bounds(count, ours, theirs, differing, tensors))
    return {
        "title": "Mixing SmolLM2-135M in float32, against mergekit",
        "columns": ["experts", "what", "moestro", "mergekit", "mergekit / moestro"],
        "rows": rows,
        "bounds": bounds,
        "notes": [
            f"mergekit {MERGEKIT} in its own environment, with the same torch and transformers. Random routers.",
            f"Medians of {REPEATS} interleaved rounds, least and most in brackets; ratios are taken within a round.",
            "All files that are read lie in memory when a run begins, and nothing waits to be written.",
            "Imports: a process that imports the modules that the command had imported, and ends.",
            "Resident memory counts pages of mapped files, for both alike; anonymous memory does not.",
            "moestro digests what it reads and writes, and waits for the disk; mergekit does neither.",
        ],
    }


def prepared(folder: Path, rivals: Sequence[Rival], count: int) -> tuple[int, int]:
    """Run each once: the experts' tensors that differ, and how many there are. Notes what each imports."""
    for rival in rivals:
        out = _emptied(folder, rival)
        command = [str(rival.python), "-X", "importtime", *rival.arguments(count, out)]
        log = _run(command, rival, folder)[1].read_text(errors="replace").splitlines()
        names = [line.rpartition("|")[2].strip() for line in log if line.startswith(IMPORT_TIME)]
        (folder / f"{rival.name}.imports").write_text("\n".join(names[1:]))
    ours, theirs = (folder / f"out-{rival.name}" for rival in rivals)
    return differing_experts(ours, theirs), expert_tensors(ours)


def rounds(folder: Path, rivals: Sequence[Rival], count: int) -> list[Series]:
    """Both rivals, one after the other, `REPEATS` times."""
    series = [Series() for _ in rivals]
    for _ in range(REPEATS):
        for rival, taken in zip(rivals, series, strict=True):
            out = _emptied(folder, rival)
            _into_memory(folder, count)
            os.sync()
            taken.whole.append(_run([str(rival.python), *rival.arguments(count, out)], rival, folder)[0])
            started = time.monotonic()
            os.sync()
            taken.flushes.append(time.monotonic() - started)
            names = folder / f"{rival.name}.imports"
            taken.imports.append(_run([str(rival.python), "-c", IMPORT, str(names)], rival, folder)[0])
    return series


def _run(command: list[str], rival: Rival, folder: Path) -> tuple[Measured, Path]:
    log = folder / "log.txt"
    try:
        return measured(command, env=rival.env, log=log), log
    except subprocess.CalledProcessError as error:
        raise ResourceError(f"{rival.name} ended with code {error.returncode}:\n{error.output}") from None


def _emptied(folder: Path, rival: Rival) -> Path:
    out = folder / f"out-{rival.name}"
    shutil.rmtree(out, ignore_errors=True)
    return out


def _into_memory(folder: Path, count: int) -> None:
    for name in ("seed", *(f"branch{number}" for number in range(count))):
        for path in (folder / name).iterdir():
            with path.open("rb", buffering=0) as stream:
                while stream.read(WARM_BYTES):
                    pass


def _rows(count: int, ours: Series, theirs: Series) -> Iterator[list[Any]]:
    for what, one, other in (
        ("whole process, s", ours.time, theirs.time),
        ("imports alone, s", ours.import_time, theirs.import_time),
        ("without imports, s", ours.work_time, theirs.work_time),
    ):
        yield [count, what, _shown(one), _shown(other), f"{ratio(other, one).median:.2f}"]
    flushes = [_shown(Timing(tuple(taken.flushes))) for taken in (ours, theirs)]
    yield [count, "afterwards, until it lies on the disk, s", *flushes, ""]
    for what, mine, peers in (
        ("peak resident memory, MB", ours.peak, theirs.peak),
        ("peak anonymous memory, MB", ours.anonymous_peak, theirs.anonymous_peak),
    ):
        yield [count, what, f"{mine / 1e6:,.0f}", f"{peers / 1e6:,.0f}", f"{peers / mine:.2f}"]


def _shown(timing: Timing) -> str:
    return f"{timing.median:.2f} ({min(timing.seconds):.2f}..{max(timing.seconds):.2f})"


def _bounds(count: int, ours: Series, theirs: Series, differing: int, tensors: int) -> Iterator[dict[str, Any]]:
    whole = ratio(theirs.time, ours.time).median
    work = ratio(theirs.work_time, ours.work_time).median
    memory = ours.peak / theirs.peak
    for what, value, limit, ok in (
        ("whole process: mergekit's time / moestro's", whole, f">= {MIN_SPEEDUP}", whole >= MIN_SPEEDUP),
        (
            "without imports: mergekit's time / moestro's",
            work,
            f">= {MIN_SPEEDUP_OF_WORK}",
            work >= MIN_SPEEDUP_OF_WORK,
        ),
        ("peak resident memory: moestro's / mergekit's", memory, f"<= {MAX_MEMORY}", memory <= MAX_MEMORY),
        (f"tensors of experts that differ, of {tensors}", differing, "== 0", differing == 0),
    ):
        yield {"what": f"{count} experts, {what}", "value": value, "limit": limit, "ok": ok}
