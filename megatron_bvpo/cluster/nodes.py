"""Which node of which job this process is on, from the environment that train.sh and Slurm set."""

from __future__ import annotations

import fcntl
import os
import socket
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_bvpo.errors import UserError

# One above torchrun's own port, on the same host.
MEETING_PORT_OFFSET = 1


@dataclass(frozen=True)
class Job:
    """The nodes of a job, seen from one of them.

    Attributes:
        nodes: how many there are.
        rank: this one, 0 to nodes - 1.
        address, port: where torchrun's ranks meet; `address` is on node 0.
        gpus: ranks a node.
        name: this node, as a person would look for it.
        names: all nodes by rank, where the scheduler told (BVPO_NODES); else empty.
        run: what sets this job apart from another one on the same port.
    """

    nodes: int
    rank: int
    address: str
    port: int
    gpus: int
    name: str
    names: tuple[str, ...] = ()
    run: str = ""

    @property
    def meeting_port(self) -> int:
        return self.port + MEETING_PORT_OFFSET

    @property
    def world_size(self) -> int:
        return self.nodes * self.gpus

    def called(self, rank: int) -> str:
        """How node `rank` is called in a message before it has told its name."""
        if rank == self.rank:
            return self.label
        return f"node {rank} ({self.names[rank]})" if rank < len(self.names) else f"node {rank}"

    @property
    def label(self) -> str:
        return f"node {self.rank} ({self.name})"


def node_name(env: Mapping[str, str] | None = None) -> str:
    env = os.environ if env is None else env
    return env.get("BVPO_NODE_NAME") or env.get("SLURMD_NODENAME") or socket.gethostname()


def _whole_number(env: Mapping[str, str], name: str, default: str, low: int, high: int) -> int:
    text = env.get(name) or default
    if not text.isdigit() or not low <= int(text) <= high:
        raise UserError(
            f"{name} is {text!r}; expected a whole number from {low} to {high}",
            field=name,
            remedy="train.sh and slurm.sbatch set it; unset it, or give the number",
        )
    return int(text)


def job_from_environment(env: Mapping[str, str] | None = None) -> Job:
    """NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT, NPROC_PER_NODE; raises UserError where one is missing or wrong."""
    env = os.environ if env is None else env
    nodes = _whole_number(env, "NNODES", "1", 1, 10000)
    rank_text = env.get("NODE_RANK", "")
    if nodes > 1 and not rank_text:
        raise UserError(
            f"NNODES is {nodes} and NODE_RANK is not set",
            field="NODE_RANK",
            remedy=f"start the same command on each node, with NODE_RANK 0 to {nodes - 1}; slurm.sbatch does this",
        )
    rank = _whole_number(env, "NODE_RANK", "0", 0, nodes - 1)
    address = env.get("MASTER_ADDR", "")
    if nodes > 1 and not address:
        raise UserError(
            f"NNODES is {nodes} and MASTER_ADDR is not set",
            field="MASTER_ADDR",
            remedy="name the host or address of node 0, the same on every node",
        )
    names = tuple((env.get("BVPO_NODES") or "").split())
    if names and len(names) != nodes:
        raise UserError(
            f"BVPO_NODES names {len(names)} nodes and NNODES is {nodes}",
            field="BVPO_NODES",
            remedy="list every node once, in the order of NODE_RANK, or unset it",
        )
    return Job(
        nodes=nodes,
        rank=rank,
        address=address or "127.0.0.1",
        port=_whole_number(env, "MASTER_PORT", "29500", 1024, 65000),
        gpus=_whole_number(env, "NPROC_PER_NODE", "1", 1, 1024),
        name=node_name(env),
        names=names,
        run=env.get("BVPO_RUN_TOKEN", ""),
    )


def interface_towards(address: str) -> str | None:
    """The network interface by which this host reaches `address`; None where that cannot be told.

    For an address of this host itself it is the interface that carries it, not the loopback.
    """
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))  # sends nothing: only the route is chosen
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    # SIOCGIFADDR of linux/sockios.h: the interface's IPv4 address
                    found = fcntl.ioctl(probe.fileno(), 0x8915, struct.pack("256s", name[:15].encode()))
                except OSError:
                    continue  # an interface without an IPv4 address
                if socket.inet_ntoa(found[20:24]) == own:
                    return name
    except OSError:
        pass
    return None


def network_defaults(job: Job, env: Mapping[str, str]) -> dict[str, str]:
    """Settings that ranks on several nodes need and the site has not made.

    gloo binds to what the host's name means, which on many nodes is 127.0.0.1.
    """
    interface = interface_towards(job.address) if job.nodes > 1 and not env.get("GLOO_SOCKET_IFNAME") else None
    return {"GLOO_SOCKET_IFNAME": interface} if interface else {}
