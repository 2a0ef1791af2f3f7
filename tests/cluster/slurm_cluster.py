"""A real Slurm of two nodes on this machine, in a folder of its own: munge, slurmctld and two slurmd.

Nothing of the machine's own configuration is used or changed. Debian's packages: slurmctld slurmd slurm-client
munge (22.05); slurmd must be built with --enable-multiple-slurmd, as Debian's is.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "sinfo", "scancel")
NODES = ("n0", "n1")
ONE_ADDRESS, OWN_ADDRESSES = ("127.0.0.1", "127.0.0.1"), ("127.0.0.1", "127.0.0.2")
# States of a job that has not ended; SIGNALING lasts a moment, when the time limit's signal is sent.
GOING_ON = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "SIGNALING", "STOPPED")

CONF = """
ClusterName=bvpotest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
AuthType=auth/munge
# A requeued job waits until its credentials have expired: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=30
MailProg=/bin/true
SchedulerParameters=sched_interval=5,batch_sched_delay=1,sched_min_interval=0
{nodes}
PartitionName=test Nodes=n0,n1 Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    return [name for name in PROGRAMS if shutil.which(name) is None]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class SlurmCluster:
    """Start with `with SlurmCluster(folder) as slurm:`; every daemon ends with the block.

    Args:
        folder: of its files, made here.
        addresses: of the nodes; with `OWN_ADDRESSES` both can listen on one port.
    """

    def __init__(self, folder: Path, addresses: tuple[str, str] = ONE_ADDRESS):
        self.folder, self.addresses = folder, addresses
        self.env = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: list[subprocess.Popen] = []

    def __enter__(self) -> SlurmCluster:
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        host = socket.gethostname()
        nodes = "\n".join(
            f"NodeName={name} NodeHostname={host} NodeAddr={address} Port={free_port()} CPUs=2 RealMemory=4000"
            for name, address in zip(NODES, self.addresses, strict=True)
        )
        text = CONF.format(host=host, folder=folder, ctld=free_port(), nodes=nodes)
        (folder / "slurm.conf").write_text(text)
        try:
            self._start_munge()
            self._daemon("slurmctld", "-D", "-i")
            for name in NODES:
                (folder / f"spool-{name}").mkdir()
                self._daemon("slurmd", "-D", "-N", name)
            self._wait_for_nodes()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        subprocess.run(["scancel", "--user=root"], env=self.env, capture_output=True, timeout=20, check=False)
        time.sleep(1)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in reversed(self._daemons):
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()

    def _start_munge(self) -> None:
        # munge wants every folder of its files' paths to be writable by nobody else.
        folder = self.folder
        key = folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"socket": "munge.socket", "pid-file": "munge.pid", "log-file": "munge.log", "seed-file": "munge.seed"}
        options = [f"--{name}={folder / file}" for name, file in files.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *options)
        deadline = time.monotonic() + 10
        while not (folder / "munge.socket").exists():
            assert time.monotonic() < deadline, self.log("munged.out")
            time.sleep(0.1)

    def _daemon(self, *command: str) -> None:
        path = self.folder / f"{command[0]}{len(self._daemons)}.out"
        with path.open("wb") as out:
            program = shutil.which(command[0])
            self._daemons.append(subprocess.Popen([program, *command[1:]], env=self.env, stdout=out, stderr=out))

    def _wait_for_nodes(self) -> None:
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            states = self.ask("sinfo", "--noheader", "--format=%T", "--Node", check=False).split()
            if states == ["idle"] * len(NODES):
                return
            time.sleep(0.5)
        raise AssertionError("the nodes did not come up\n" + self.log("slurmctld.log"))

    def log(self, name: str) -> str:
        path = self.folder / name
        return path.read_text(errors="replace")[-4000:] if path.exists() else f"no {name}"

    def ask(self, *command: str, check: bool = True, **env: str) -> str:
        done = subprocess.run(command, env={**self.env, **env}, capture_output=True, text=True, timeout=30, check=False)
        assert not check or done.returncode == 0, done.stderr
        return done.stdout

    def submit(self, *arguments: str, cwd: Path, env: dict[str, str]) -> int:
        done = subprocess.run(
            ["sbatch", *arguments], env={**self.env, **env}, cwd=cwd, capture_output=True, text=True, timeout=30
        )
        assert done.returncode == 0, done.stderr
        return int(re.search(r"Submitted batch job (\d+)", done.stdout).group(1))

    def job(self, number: int) -> dict[str, str]:
        """What `scontrol show job` says, such as JobState and Restarts."""
        text = self.ask("scontrol", "--oneliner", "show", "job", str(number))
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, number: int, seconds: float, log: Path) -> dict[str, str]:
        """The job's record when it has ended for good; a job that goes back into the queue has not."""
        deadline = time.monotonic() + seconds
        while True:
            record = self.job(number)
            if record["JobState"] not in GOING_ON:
                return record
            if time.monotonic() > deadline:
                told = log.read_text()[-4000:] if log.exists() else ""
                raise AssertionError(f"{record}\n{told}\n{self.log('slurmctld.log')}")
            time.sleep(0.5)
