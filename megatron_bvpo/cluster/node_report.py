"""The preflight's report for a person."""

from __future__ import annotations

import sys

from megatron_bvpo.cluster.findings import OK, PROBLEM, Finding, NodeReport
from megatron_bvpo.cluster.nodes import Job


def print_verdict(job: Job, reports: dict[int, NodeReport], whole: list[Finding], seconds: float) -> bool:
    """Print all of it on node 0, and on another node what concerns that node; True if the run may start."""
    lines, problems = verdict_lines(reports, whole)
    if job.rank == 0:
        print(f"preflight of {job.nodes} node(s) with {job.gpus} rank(s) each")
        print("\n".join(lines))
    else:
        own = [line for line in lines if job.label in line and line.split()[0] != OK]
        print("\n".join(own), end="\n" if own else "")
    if problems:
        print(f"preflight: {len(problems)} problem(s) after {seconds:.0f} s; the run does not start.", file=sys.stderr)
        for text in problems if job.rank == 0 else []:
            print(f"preflight: PROBLEM  {text}", file=sys.stderr)
    elif job.rank == 0:
        print(f"preflight: passed after {seconds:.0f} s.")
    return not problems


def verdict_lines(reports: dict[int, NodeReport], whole: list[Finding]) -> tuple[list[str], list[str]]:
    """Lines of the report, what all nodes say alike in one line; and the problems, each with its node."""
    said: dict[Finding, list[str]] = {}
    for report in reports.values():
        for finding in report.findings:
            said.setdefault(finding, []).append(report.label)
    lines, problems = [], []
    for finding, labels in said.items():
        everybody = len(labels) == len(reports) and len(reports) > 1
        where = "all nodes" if everybody else ", ".join(labels)
        lines.append(f"  {finding.level:<8} {where}: {finding.text}")
        if finding.level == PROBLEM:
            problems.append(f"{', '.join(labels)}: {finding.text}")
    for finding in whole:
        lines.append(f"  {finding.level:<8} {finding.text}")
        if finding.level == PROBLEM:
            problems.append(finding.text)
    return lines, problems
