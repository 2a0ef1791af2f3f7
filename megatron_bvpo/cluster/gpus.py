"""Are a node's GPUs there, healthy and free: what nvidia-smi says."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping

from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding

# Fields of `nvidia-smi --help-query-gpu`; those that a GPU does not have come back as [N/A] or [Not Supported].
FIELDS = (
    "index",
    "name",
    "uuid",
    "memory.total",
    "memory.used",
    "temperature.gpu",
    "ecc.errors.uncorrected.volatile.total",
    "mig.mode.current",
    "driver_version",
)
# Asked for apart, and by both of their names: to a driver that does not know one of its fields, nvidia-smi refuses
# the whole query.
SLOWDOWNS = ("hw_slowdown", "hw_thermal_slowdown")
SLOWDOWN_PREFIXES = ("clocks_event_reasons", "clocks_throttle_reasons")
# A GPU that nobody uses holds some hundred MiB for its driver.
FREE_MIB = 2000
HOT_C = 85


def query(executable: str = "nvidia-smi", timeout: float = 30) -> list[dict[str, str]] | str:
    """One dict of FIELDS and SLOWDOWNS a GPU, or what went wrong; a slowdown that is not known is [N/A]."""
    found = _ask(executable, [f"--query-gpu={','.join(FIELDS)}"], timeout)
    if isinstance(found, str):
        return found
    rows = [row for row in found if len(row) == len(FIELDS)]
    slow = _slowdowns(executable, timeout) if rows else {}
    unknown = dict.fromkeys(SLOWDOWNS, "[N/A]")
    return [{**dict(zip(FIELDS, row, strict=True)), **slow.get(row[0], unknown)} for row in rows] or "it lists no GPU"


def _slowdowns(executable: str, timeout: float) -> dict[str, dict[str, str]]:
    """By the GPU's index, Active or Not Active for each of SLOWDOWNS; empty where nvidia-smi cannot tell."""
    for prefix in SLOWDOWN_PREFIXES:
        names = ",".join(f"{prefix}.{reason}" for reason in SLOWDOWNS)
        found = _ask(executable, [f"--query-gpu=index,{names}"], timeout)
        if not isinstance(found, str):
            return {row[0]: dict(zip(SLOWDOWNS, row[1:], strict=True)) for row in found if len(row) == 3}
    return {}


def processes(executable: str = "nvidia-smi", timeout: float = 30) -> list[dict[str, str]]:
    """The computing processes on this node's GPUs; empty where nvidia-smi cannot tell."""
    names = ("gpu_uuid", "pid", "used_memory")
    found = _ask(executable, [f"--query-compute-apps={','.join(names)}"], timeout)
    if isinstance(found, str):
        return []
    return [dict(zip(names, row, strict=True)) for row in found if len(row) == len(names)]


def _ask(executable: str, arguments: list[str], timeout: float) -> list[list[str]] | str:
    try:
        done = subprocess.run(
            [executable, *arguments, "--format=csv,noheader,nounits"],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer in {timeout:g} s"
    except OSError as e:
        return str(e)
    if done.returncode:
        return (done.stderr or done.stdout).strip()[-300:] or f"exit code {done.returncode}"
    return [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines() if line.strip()]


def visible(rows: list[dict[str, str]], selection: str | None) -> list[dict[str, str]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves to this job."""
    if selection is None:
        return rows
    wanted = [item.strip() for item in selection.split(",") if item.strip()]
    return [
        row for row in rows if row["index"] in wanted or any(row["uuid"].startswith(w) for w in wanted if len(w) > 3)
    ]


def check_gpus(wanted: int, rehearsal: bool, env: Mapping[str, str] | None = None) -> tuple[dict, list[Finding]]:
    """Facts (names, driver, memory in GiB) and findings about this node's GPUs."""
    if rehearsal:
        return {}, [Finding("GPUs", OK, f"none needed: {wanted} CPU ranks")]
    if shutil.which("nvidia-smi") is None:
        return {}, [
            Finding(
                "GPUs",
                PROBLEM,
                "nvidia-smi is not there",
                "In a container, start it with --nv; on a node without GPUs, ask for --gres=gpu",
            )
        ]
    rows = query()
    if isinstance(rows, str):
        return {}, [
            Finding("GPUs", PROBLEM, f"nvidia-smi fails: {rows}", "Drain the node; the driver or a GPU needs a reset")
        ]
    rows = visible(rows, (os.environ if env is None else env).get("CUDA_VISIBLE_DEVICES"))
    facts = {
        "GPUs": ", ".join(sorted({row["name"] for row in rows})),
        "driver": ", ".join(sorted({row["driver_version"] for row in rows})),
    }
    memory = [found for row in rows if (found := _number(row["memory.total"]))]
    if memory:
        facts["GiB"] = round(min(memory) / 1024, 1)
    return facts, judge(rows, processes(), wanted)


def judge(rows: list[dict[str, str]], apps: list[dict[str, str]], wanted: int) -> list[Finding]:
    """Findings from nvidia-smi's answers; pure."""
    findings = []
    if len(rows) < wanted:
        findings.append(
            Finding(
                "GPUs",
                PROBLEM,
                f"{len(rows)} GPUs are visible and {wanted} ranks are to run",
                "A GPU has fallen off the bus or was not asked for: check --gres, and drain the node",
            )
        )
    for row in rows:
        findings += _judge_one(row, [app for app in apps if app["gpu_uuid"] == row["uuid"]])
    if not findings:
        total = min(_number(row["memory.total"]) or 0 for row in rows)
        findings.append(
            Finding("GPUs", OK, f"{len(rows)} × {rows[0]['name']}, {total:.0f} MiB, free and without errors")
        )
    return findings


def _judge_one(row: dict[str, str], apps: list[dict[str, str]]) -> list[Finding]:
    name, findings = f"GPU {row['index']}", []
    used = _number(row["memory.used"])
    if apps or (used or 0) > FREE_MIB:
        who = ", ".join(f"process {app['pid']} ({app['used_memory']} MiB)" for app in apps) or "no visible process"
        findings.append(
            Finding(
                name, PROBLEM, f"{used or 0:.0f} MiB are in use: {who}", "End what a former job left, or drain the node"
            )
        )
    errors = _number(row["ecc.errors.uncorrected.volatile.total"])
    if errors:
        findings.append(
            Finding(name, PROBLEM, f"{errors:.0f} uncorrected memory errors since the driver started", "Drain the node")
        )
    if row["mig.mode.current"] == "Enabled":
        findings.append(Finding(name, PROBLEM, "is cut into MIG slices", "NCCL needs whole GPUs: ask for another node"))
    for reason in SLOWDOWNS:
        if row[reason] == "Active":
            findings.append(
                Finding(name, WARNING, f"is slowed down ({reason})", "One slow GPU slows all: tell the site")
            )
    heat = _number(row["temperature.gpu"])
    if heat is not None and heat >= HOT_C:
        findings.append(Finding(name, WARNING, f"is at {heat:.0f} °C before the run", "Tell the site"))
    return findings


def _number(text: str) -> float | None:
    """None for [N/A] and [Not Supported]."""
    try:
        return float(text)
    except ValueError:
        return None
