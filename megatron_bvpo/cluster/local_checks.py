"""What a node can find out about itself: versions, disk, limits, InfiniBand, data, model. No torch is loaded."""

from __future__ import annotations

import hashlib
import os
import platform
import resource
import shutil
import tempfile
from pathlib import Path

import megatron_bvpo
from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding
from megatron_bvpo.data.shared_cache import room_for
from megatron_bvpo.errors import or_bound
from megatron_bvpo.launching import versions
from megatron_bvpo.launching.run_file import RunFile

GIB = 1024**3
# Besides the packages of launching/versions.py; those that a node lacks are compared as missing.
MORE_PACKAGES = (
    "transformer-engine",
    "flash-attn",
    "apex",
    "accelerate",
    "numpy",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
# Bytes at the head of a data file that nodes compare.
SAMPLE = 1024**2


def version_facts() -> dict[str, str]:
    """Everything whose version must be the same on all nodes."""
    names = dict.fromkeys([row.package for row in versions.SUPPORTED] + list(MORE_PACKAGES))
    found = {name: versions.installed(name) or "missing" for name in names}
    found["Python"] = platform.python_version()
    found["megatron-bvpo"] = f"{megatron_bvpo.__version__} (source {source_digest()})"
    return found


def source_digest() -> str:
    """Eight digits over this package's files: two checkouts can have one version number."""
    digest = hashlib.sha256()
    root = Path(megatron_bvpo.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:8]


def check_versions() -> list[Finding]:
    bad = [finding for finding in versions.findings() if not finding.ok]
    if bad and os.environ.get(versions.SKIP) != "1":
        remedy = "Run: pip install " + " ".join(f"'{f.row.package}{f.row.specifier}'" for f in bad)
        return [Finding("versions", PROBLEM, "; ".join(map(str, bad)), remedy)]
    return [Finding("versions", OK, f"megatron-bvpo {megatron_bvpo.__version__}, Python {platform.python_version()}")]


def check_disk(folder: Path, need_gib: float) -> Finding:
    """Whether the run's folder has room for what it will save."""
    free = shutil.disk_usage(folder).free / GIB
    if free < need_gib:
        return Finding(
            "disk",
            PROBLEM,
            f"{folder} has {free:.0f} GiB free, {need_gib:g} GiB are wanted",
            "Name another --output_dir, set --save_total_limit, or lower BVPO_MIN_FREE_GIB",
        )
    return Finding("disk", OK, f"{folder} has {free:.0f} GiB free")


def check_room_for_rows(folder: Path, run: RunFile) -> Finding:
    """Whether the disk takes the rows of the run's files, read and encoded: an estimate, without hub data sets."""
    files = [spec.split("#")[0] for spec in (*run.values("dataset"), *run.values("val_dataset"))]
    need, free = room_for(files) / GIB, shutil.disk_usage(folder).free / GIB
    text = f"{folder} has {free:.1f} GiB free, the rows take about {need:.1f} GiB"
    if free < need:
        return Finding("disk", PROBLEM, text, "Set BVPO_DATA_CACHE to a folder with room for them that all nodes share")
    return Finding("disk", OK, text)


def check_scratch() -> list[Finding]:
    """The node's own folders: temporary files, and the shared memory that NCCL and data loaders use."""
    findings = []
    try:
        with tempfile.NamedTemporaryFile() as file:
            file.write(b"x")
    except OSError as e:
        findings.append(
            Finding(
                "temporary files", PROBLEM, f"cannot be written: {e.strerror}", "Set TMPDIR to a folder on this node"
            )
        )
    shm = Path("/dev/shm")
    if shm.exists():
        free = shutil.disk_usage(shm).free / GIB
        if free < 1:
            findings.append(
                Finding(
                    "/dev/shm",
                    PROBLEM,
                    f"{free:.2f} GiB free; NCCL needs it between the GPUs of a node",
                    "Remove what a former job left, or start the container with a larger /dev/shm",
                )
            )
    return findings


def check_cores(ranks: int, rehearsal: bool) -> list[Finding]:
    """Slurm gives a task one core unless it is asked for more, and eight ranks on one core crawl."""
    cores = len(os.sched_getaffinity(0))
    if rehearsal or cores >= 2 * ranks:
        return []
    return [
        Finding(
            "CPU cores",
            PROBLEM if cores < ranks else WARNING,
            f"{cores} for {ranks} ranks",
            "Submit with --exclusive, or ask for more with --cpus-per-task",
        )
    ]


def infiniband_ports(root: Path = Path("/sys/class/infiniband")) -> dict[str, str]:
    """State of each InfiniBand or RoCE port, such as {"mlx5_0/1": "ACTIVE"}."""
    found = {}
    for state in sorted(root.glob("*/ports/*/state")):
        try:
            found[f"{state.parts[-4]}/{state.parts[-2]}"] = state.read_text().split(":")[-1].strip()
        except OSError:
            continue
    return found


def check_infiniband(ports: dict[str, str], memory_limit: int) -> list[Finding]:
    """`memory_limit`: bytes that may be locked, RLIM_INFINITY for any."""
    if not ports:
        return []
    findings = []
    down = sorted(name for name, state in ports.items() if state != "ACTIVE")
    active = len(ports) - len(down)
    if not active:
        findings.append(Finding("InfiniBand", PROBLEM, f"no port is active: {', '.join(down)}", "Drain the node"))
    elif down:
        findings.append(
            Finding(
                "InfiniBand",
                WARNING,
                f"{active} ports active, not active: {', '.join(down)}",
                "Normal where a port has no cable",
            )
        )
    if active and memory_limit != resource.RLIM_INFINITY and memory_limit < GIB:
        findings.append(
            Finding(
                "locked memory",
                PROBLEM,
                f"the limit is {memory_limit // 1024} KiB, and InfiniBand registers its buffers",
                "Start with `ulimit -l unlimited`; under Slurm: LimitMEMLOCK=infinity for slurmd, "
                "PropagateResourceLimitsExcept=MEMLOCK",
            )
        )
    return findings


def locked_memory_limit() -> int:
    return resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]


def data_facts(run: RunFile) -> tuple[dict[str, str], list[Finding]]:
    """A digest of each data file and of the model's folder, and what cannot be read."""
    facts: dict[str, str] = {}
    findings: list[Finding] = []
    specs = [*run.values("dataset"), *run.values("val_dataset")]
    for spec in specs:
        path = Path(spec.split("#")[0])
        if not path.is_absolute() and not path.exists() and path.suffix not in (".json", ".jsonl", ".csv", ".txt"):
            findings.append(Finding("data", OK, f"{spec} is no file here; ms-swift looks for it on its hub"))
            continue
        _add_digest(facts, findings, path, "dataset", f"Check the path, and that it is mounted here{or_bound()}")
    for spec in [*run.values("cached_dataset"), *run.values("cached_val_dataset")]:
        path = Path(spec.split("#")[0])
        if not path.is_dir():
            findings.append(
                Finding(
                    "data",
                    PROBLEM,
                    f"cached_dataset {path} is no folder",
                    f"Check that it is mounted here{or_bound()}, or write it again: swift export --to_cached_dataset",
                )
            )
        for part in sorted(path.rglob("*.json")):
            _add_digest(facts, findings, part, "cached_dataset", "Check its permissions")
    model = run.value("model")
    if model and (os.path.isdir(model) or model.startswith(("/", "./", "../"))):
        _add_digest(
            facts,
            findings,
            Path(model) / "config.json",
            "model",
            f"Check the path, and that it is mounted here{or_bound()}",
        )
        sizes = sorted((p.name, p.stat().st_size) for p in Path(model).glob("*.safetensors"))
        facts[f"{model}: weights"] = f"{len(sizes)} files, {sum(size for _, size in sizes)} bytes"
    if facts and not any(f.level == PROBLEM for f in findings):
        findings.append(Finding("data", OK, f"{len(facts)} files of data and model can be read"))
    return facts, findings


def _add_digest(facts: dict[str, str], findings: list[Finding], path: Path, field: str, remedy: str) -> None:
    try:
        with path.open("rb") as file:
            head = hashlib.sha256(file.read(SAMPLE)).hexdigest()[:8]
        facts[str(path)] = f"{path.stat().st_size} bytes, {head}"
    except OSError as e:
        findings.append(Finding("data", PROBLEM, f"--{field} {path}: {e.strerror}", remedy))
