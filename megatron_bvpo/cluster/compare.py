"""From what the nodes said of themselves to what is wrong with the job. Pure: no network, no files."""

from __future__ import annotations

from collections import Counter
from statistics import median
from typing import Any

from megatron_bvpo.cluster.findings import OK, PROBLEM, WARNING, Finding, NodeReport
from megatron_bvpo.cluster.links import PHASES, furthest

# Seconds. Above the second, credentials (munge: 300 s) and the order of logs cannot be relied on.
CLOCK_WARNING, CLOCK_PROBLEM = 2.0, 30.0
# A node below this part of the median rate slows all others.
SLOW = 0.6


def compare_facts(reports: dict[int, NodeReport]) -> list[Finding]:
    """Versions, GPUs, data files: the same on all nodes; each other value names its nodes."""
    findings = []
    remedies = {
        "versions": "Use one image, or one environment on a shared disk, for all nodes",
        "data": "The nodes see different files: a copy on a node's own disk, or a mount that is missing",
        "hardware": "Ask for one kind of node (--constraint)",
    }
    for group, remedy in remedies.items():
        keys = sorted({key for report in reports.values() for key in report.facts.get(group, {})})
        for key in keys:
            values = {rank: str(report.facts.get(group, {}).get(key, "missing")) for rank, report in reports.items()}
            usual, count = Counter(values.values()).most_common(1)[0]
            if count == len(values):
                continue
            odd = {rank: value for rank, value in values.items() if value != usual}
            who = "; ".join(
                f"{value} on {_labels(reports, [r for r in odd if odd[r] == value])}"
                for value in dict.fromkeys(odd.values())
            )
            findings.append(Finding(group, PROBLEM, f"{key}: {usual} on {_most(reports, odd)} and {who}", remedy))
    if reports and not findings:
        findings.append(Finding("the same on all nodes", OK, "versions, GPUs, data files"))
    return findings


def _labels(reports: dict[int, NodeReport], ranks) -> str:
    return ", ".join(reports[rank].label for rank in sorted(ranks))


def _most(reports: dict[int, NodeReport], odd: dict) -> str:
    rest = [rank for rank in reports if rank not in odd]
    return _labels(reports, rest) if len(rest) <= 2 else f"{len(rest)} other nodes"


def compare_clocks(reports: dict[int, NodeReport]) -> list[Finding]:
    """Each node's clock against node 0's."""
    findings, worst = [], 0.0
    for report in reports.values():
        offset, slack = report.facts.get("clock", (0.0, 0.0))
        size = max(0.0, abs(offset) - slack)  # what the way there and back does not explain
        worst = max(worst, size)
        if size >= CLOCK_WARNING:
            findings.append(
                Finding(
                    "clock",
                    PROBLEM if size >= CLOCK_PROBLEM else WARNING,
                    f"{report.label} is {abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} node 0",
                    "Start chrony or ntpd on it",
                )
            )
    if len(reports) > 1 and not findings:
        findings.append(Finding("clocks", OK, f"within {max(worst, 0.1):.1f} s"))
    return findings


def missing_nodes(names: dict[int, str], arrived: set[int], nodes: int, seconds: float, where: str) -> list[Finding]:
    """Nodes that never came."""
    return [
        Finding(
            "nodes",
            PROBLEM,
            f"{names[rank]} has not come to {where} within {seconds:.0f} s",
            "Is the same command running there? Does its log say why not? Can it open a connection to that port?",
        )
        for rank in range(nodes)
        if rank not in arrived
    ]


def judge_links(
    links: dict[int, dict[str, Any]], reports: dict[int, NodeReport], lowest_GBs: float = 0.0
) -> list[Finding]:
    """Findings about computing and sending, from every node's ranks.

    Args:
        links: node → what `run_links` returned.
        lowest_GBs: the least bus bandwidth across nodes that is taken without a word; 0: any.
    """
    findings = _broken_ranks(links, reports)
    if not findings:
        findings = _hung(links, reports)
    findings += _slow(links, reports)
    findings += _transport(links, reports)
    across = _rates(links, "across")
    if across:
        rate = min(across.values())
        low = rate < lowest_GBs
        findings.append(
            Finding(
                "all-reduce across nodes",
                WARNING if low else OK,
                f"{rate:.2f} GB/s bus bandwidth over {len(links)} nodes"
                + (f", {lowest_GBs:g} are expected" if low else ""),
                "Compare with the site's nccl-tests, and look for NET/IB and GDRDMA in NCCL_DEBUG=INFO" if low else "",
            )
        )
    within = _rates(links, "within")
    if within:
        low, high = min(within.values()), max(within.values())
        findings.append(Finding("all-reduce within a node", OK, f"{low:.2f} to {high:.2f} GB/s bus bandwidth"))
    return findings


def _broken_ranks(links, reports) -> list[Finding]:
    """Ranks that raised by themselves. Those that only lost a peer or timed out are victims."""
    found = []
    for node, told in links.items():
        for local, notes in told["ranks"].items():
            error = next((n["error"] for n in notes if n["phase"] == "error"), None)
            reached = furthest(notes)
            if reached in ("nothing", "started") or (error and error.startswith("ArithmeticError")):
                what = error or told["stderr"].get(local) or "it did not start in time"
                remedy = (
                    "Run `bvpo doctor` there" if reached == "nothing" else "Drain the node: this GPU cannot be trusted"
                )
                if not error:  # it was ended when the time was over, and may only have been slow
                    remedy = f"Set BVPO_PREFLIGHT_SECONDS=300 to give it more time; if it fails again: {remedy}"
                found.append(Finding("compute", PROBLEM, f"rank {local} of {reports[node].label}: {what}", remedy))
    return found


def _hung(links, reports) -> list[Finding]:
    """Who is to blame where ranks did not get to the end: the node in all failed pairs, else who came least far."""
    reached = {
        node: min((furthest(notes) for notes in told["ranks"].values()), key=PHASES.index)
        for node, told in links.items()
    }
    if all(phase == "done" for phase in reached.values()):
        return []
    failed_within = [node for node, phase in reached.items() if phase == "joined" and len(links[node]["ranks"]) > 1]
    least = min(reached.values(), key=PHASES.index)
    if least == "computed":
        who = [node for node, phase in reached.items() if phase == least]
        place = "cannot join the others at MASTER_ADDR:MASTER_PORT"
        remedy = "Check the route and firewall from there to node 0, and that nothing else uses MASTER_PORT"
        if any("127.0.0.1" in _first_error(links[node]) for node in who):
            remedy = "The hosts' names mean 127.0.0.1: set GLOO_SOCKET_IFNAME to the interface that reaches all nodes"
    elif failed_within and len(failed_within) < len(links):
        who, place = failed_within, "hangs in an all-reduce between its own GPUs"
        remedy = "Drain the node, or look at nvidia-smi topo -m and NCCL_P2P_DISABLE=1 there"
    else:
        who = _lonely(links)
        place = "cannot exchange data with its neighbours"
        remedy = (
            "Check its network: ibstat, and NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME (an interface that reaches "
            "all nodes)"
        )
    error = next((e for e in (_first_error(links[node]) for node in who) if e), "")
    names = ", ".join(reports[node].label for node in who)
    return [Finding("network", PROBLEM, f"{names} {place}" + (f" ({error})" if error else ""), remedy)]


def _first_error(told: dict[str, Any]) -> str:
    errors = (n["error"] for notes in told["ranks"].values() for n in notes if n["phase"] == "error")
    return next(errors, "")


def _lonely(links) -> list[int]:
    """Nodes none of whose pairs worked; all nodes where every pair worked, or none did."""
    good = {
        node
        for told in links.values()
        for notes in told["ranks"].values()
        for n in notes
        if n["phase"] == "pair"
        for node in n["nodes"]
    }
    return sorted(set(links) - good) or sorted(links)


def _rates(links, phase: str) -> dict[int, float]:
    """Per node the lowest rate of its ranks in a phase."""
    found = {}
    for node, told in links.items():
        rates = [n["GBs"] for notes in told["ranks"].values() for n in notes if n["phase"] == phase]
        if rates:
            found[node] = min(rates)
    return found


def _slow(links, reports) -> list[Finding]:
    """GPUs and nodes far below the others."""
    findings = []
    speeds = {
        (node, local): n["TFLOPs"]
        for node, told in links.items()
        for local, notes in told["ranks"].items()
        for n in notes
        if n["phase"] == "computed" and "TFLOPs" in n
    }
    usual = median(speeds.values()) if speeds else 0.0
    for (node, local), speed in speeds.items():
        if speed < SLOW * usual:
            what = f"GPU {local} of {reports[node].label} computes {speed:.0f} TFLOP/s, the median is {usual:.0f}"
            findings.append(Finding("compute", WARNING, what, "One slow GPU slows all: drain the node"))
    rates = _rates(links, "within")
    usual = median(rates.values()) if rates else 0.0
    on_gpu = bool(speeds)  # CPU ranks share their cores, and their rates say nothing
    for node, rate in rates.items():
        if on_gpu and rate < SLOW * usual:
            what = f"{reports[node].label} has {rate:.1f} GB/s between its GPUs, the median is {usual:.1f}"
            findings.append(
                Finding("all-reduce within a node", WARNING, what, "Look at nvidia-smi nvlink --status there")
            )
    return findings


def _has_infiniband(transports: set[str]) -> bool:
    return any(name.startswith("NET/IB") for name in transports)  # IB, IBext_v8, …


def _transport(links, reports) -> list[Finding]:
    """Does NCCL use InfiniBand where it is there? Its own log tells."""
    findings, used = [], set()
    for node, told in links.items():
        transports = {*told["transports"], *(f"NET/{name}" for name in told["networks"])}
        used |= transports
        ports = reports[node].facts.get("infiniband", {})
        active = [name for name, state in ports.items() if state == "ACTIVE"]
        if active and "NET/Socket" in transports and not _has_infiniband(transports):
            findings.append(
                Finding(
                    "InfiniBand",
                    PROBLEM,
                    f"{reports[node].label} has active ports ({', '.join(active)}) and NCCL uses TCP",
                    "Unset NCCL_IB_DISABLE, check NCCL_IB_HCA; in a container, libibverbs and /dev/infiniband must be "
                    "there, and the locked memory unlimited",
                )
            )
    by_nccl = any(n.get("backend") == "nccl" for told in links.values() for ns in told["ranks"].values() for n in ns)
    if len(links) > 1 and by_nccl and not used and _rates(links, "across"):
        findings.append(
            Finding(
                "InfiniBand",
                WARNING,
                "NCCL's log names no network, so it is not known whether InfiniBand is used",
                "Compare the bandwidth across nodes below with the site's nccl-tests",
            )
        )
    if len(links) > 1 and not findings and used:
        fast = _has_infiniband(used)
        findings.append(
            Finding(
                "InfiniBand",
                OK if fast else WARNING,
                f"NCCL sends between nodes by {', '.join(sorted(used))}",
                "" if fast else "Without InfiniBand or RoCE the exchange of gradients takes most of a step",
            )
        )
    return findings
