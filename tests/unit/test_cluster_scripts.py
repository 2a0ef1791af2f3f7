"""The shell scripts: clean under shellcheck, clear about what a site must set, and silent about secrets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(
    [path for folder in ("launch/*", "containers/*.sh", "tests/*/*.sh") for path in ROOT.glob(folder) if path.is_file()]
)
SECRET = "hf_" + "S3cretS3cretS3cret"
# Set by Slurm itself, the shell, or the system.
NOT_OURS = re.compile(r"^(SLURM_|BASH|PATH$|HOME$|SECONDS$|VIRTUAL_ENV$|PYTHONPATH$|TMPDIR$|USER$|IFS$)")


def shellcheck() -> str:
    found = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert found, "shellcheck comes with the test extra: pip install -e '.[test]'"
    return found


def test_there_are_scripts():
    names = {path.name for path in SCRIPTS}
    assert {"env.sh", "train.sh", "slurm.sbatch", "rehearse.sh", "test.sh"} <= names


def test_a_python_that_is_asked_for_is_that_one_or_none(tmp_path):
    """Not the next best: the tests of one version would run with another."""
    other = tmp_path / "python3.12"
    other.write_text("#!/bin/sh\nexit 127\n")
    other.chmod(0o755)
    find = ["bash", "-c", f". {ROOT}/launch/env.sh; bvpo_find_python"]
    for asked, code, answer in ((str(other), 1, ""), (sys.executable, 0, sys.executable)):
        done = subprocess.run(find, env={**os.environ, "BVPO_PYTHON": asked}, capture_output=True, text=True)
        assert (done.returncode, done.stdout.strip()) == (code, answer)
        assert not code or f"BVPO_PYTHON={asked} does not run" in done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shellcheck(script):
    done = subprocess.run(
        [shellcheck(), "--external-sources", "--source-path=SCRIPTDIR", str(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_shellcheck_would_complain(tmp_path):
    bad = tmp_path / "bad.sh"
    bad.write_text("#!/bin/sh\nrm -rf $1/*\n")
    assert subprocess.run([shellcheck(), str(bad)], capture_output=True).returncode != 0


@pytest.mark.parametrize("name", ["train.sh", "slurm.sbatch", "sample.sbatch"])
def test_every_variable_that_a_site_may_set_is_explained_and_has_a_default(name):
    """Under `set -u` a variable without a default would end the script with "unbound variable"."""
    text = (ROOT / "launch" / name).read_text()
    code = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith("#"))
    head = text[: text.index("set -euo pipefail")] + (ROOT / "launch" / "train.sh").read_text().split("set -euo")[0]
    read = set(re.findall(r"\$\{?([A-Z][A-Z0-9_]+)", code))
    with_default = set(re.findall(r"\$\{([A-Z][A-Z0-9_]+):?[-+]", code))
    assigned = set(re.findall(r"\b([A-Z][A-Z0-9_]+)=", code))
    for variable in sorted(v for v in read if not NOT_OURS.match(v)):
        assert variable in with_default or variable in assigned, f"{variable} has no default"
    internal = {"BVPO_ATTEMPT", "BVPO_RUN_TOKEN", "BVPO_NODES", "BVPO_STOP_FILE", "BVPO_ROOT", "BVPO_REHEARSAL"}
    internal.add("BVPO_IN_IMAGE")
    for variable in sorted(with_default - internal):
        if not NOT_OURS.match(variable):
            assert variable in head, f"{variable} is not explained at the head of {name}"


def run(script: str, *arguments: str, env: dict[str, str] | None = None, cwd: Path = ROOT):
    made = {"PATH": os.environ["PATH"], "HF_TOKEN": SECRET, "WANDB_API_KEY": SECRET, **(env or {})}
    done = subprocess.run(
        [str(ROOT / "launch" / script), *arguments], env=made, cwd=cwd, capture_output=True, text=True, timeout=60
    )
    assert SECRET not in done.stdout + done.stderr
    assert "unbound variable" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    return done.returncode, done.stderr.strip()


def test_train_says_what_is_missing(tmp_path):
    python = {"BVPO_PYTHON_BIN": sys.executable}
    config = tmp_path / "run.yaml"
    config.write_text("model: m\n")
    assert run("train.sh") == (2, "train.sh: no run given; usage: launch/train.sh configs/FILE.yaml [--flag value …]")
    code, told = run("train.sh", str(config), env={"BVPO_PYTHON_BIN": "/no/python"})
    assert code == 2 and "BVPO_PYTHON_BIN: there is no /no/python" in told
    code, told = run("train.sh", str(config), env={**python, "BVPO_REHEARSAL": "1"})
    assert code == 2 and "NPROC_PER_NODE is not set" in told
    code, told = run("train.sh", str(config), env={**python, "NPROC_PER_NODE": "1", "NNODES": "2"})
    assert code == 2 and "NODE_RANK: NNODES is 2 and NODE_RANK is not set" in told
    code, told = run("train.sh", str(tmp_path / "gone.yaml"), env={**python, "NPROC_PER_NODE": "1"})
    assert code == 2 and "gone.yaml: cannot be read" in told
    code, told = run("train.sh", str(config), env={**python, "NPROC_PER_NODE": "1", "BVPO_PREFLIGHT": "maybe"})
    assert code == 2 and "expected 1, 0 or only" in told


def test_train_says_that_this_python_has_no_packages(tmp_path):
    """A system's bare python3, which would else end in a ModuleNotFoundError."""
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # -S: without the environment's packages
    bare.chmod(0o755)
    env = {"NPROC_PER_NODE": "1", "PATH": f"{tmp_path}:/usr/bin:/bin"}
    for more in ({"BVPO_PYTHON_BIN": str(bare)}, {"VIRTUAL_ENV": "/gone"}):
        if "VIRTUAL_ENV" in more and (ROOT / ".venv").exists():
            continue  # the checkout's own environment is found, as it should be
        code, told = run("train.sh", "x.yaml", env={**env, **more})
        assert code == 2 and "ms-swift" in told and "launch/rehearse.sh" in told and "BVPO_IMAGE" in told


def test_train_says_that_the_gpus_cannot_be_counted(tmp_path):
    env = {"BVPO_PYTHON_BIN": sys.executable, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 'Failed to initialize NVML: Driver/library version mismatch'; exit 18\n")
    smi.chmod(0o755)
    code, told = run("train.sh", "x.yaml", env=env)
    assert code == 2 and "nvidia-smi fails (Failed to initialize NVML" in told and "drain the node" in told
    smi.write_text("#!/bin/sh\necho 'No devices found.'\n")
    code, told = run("train.sh", "x.yaml", env=env)
    assert code == 2 and "lists no GPU" in told
    smi.write_text("#!/bin/sh\nprintf 'GPU 0: NVIDIA H100 (UUID: GPU-a)\\nGPU 1: NVIDIA H100 (UUID: GPU-b)\\n'\n")
    code, told = run("train.sh", "x.yaml", env={**env, "NNODES": "2"})
    assert "NODE_RANK is not set" in told, "they were counted, and the next mistake is named"


def test_a_secret_in_yaml_is_refused_before_anything_prints_it(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: m\nhub_token: {SECRET}\n")
    for preflight in "01":
        env = {"BVPO_PYTHON_BIN": sys.executable, "NPROC_PER_NODE": "1", "BVPO_PREFLIGHT": preflight}
        code, told = run("train.sh", str(config), env=env, cwd=tmp_path)
        assert code == 2 and "hub_token" in told and "HF_TOKEN" in told


def test_a_run_that_could_not_go_on_is_refused_before_anything_starts(tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("model: m\nno_save_optim: true\n")
    for preflight in "01":
        env = {"BVPO_PYTHON_BIN": sys.executable, "NPROC_PER_NODE": "1", "BVPO_PREFLIGHT": preflight}
        code, told = run("train.sh", str(config), env=env, cwd=tmp_path)
        assert code == 2 and "no_save_optim: is true" in told and len(told.splitlines()) == 1


def test_sbatch_says_what_is_missing(tmp_path):
    """Slurm's own programs are stood in for by scripts: what is tested comes before the job starts."""
    for name, answer in (("scontrol", "n0"), ("squeue", "RUNNING"), ("srun", "")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {answer}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_NUM_NODES": "1"}
    slurm["PATH"] = f"{tmp_path}:{os.environ['PATH']}"
    slurm["BVPO_RUN_DIR"] = str(tmp_path / "run")
    code, told = run("slurm.sbatch", "x.yaml")
    assert code == 2 and "submit this with sbatch" in told
    code, told = run("slurm.sbatch", env=slurm)
    assert code == 2 and "no run given" in told
    code, told = run("slurm.sbatch", "x.yaml", env={**slurm, "SLURM_SUBMIT_DIR": str(tmp_path)})
    assert code == 2 and "set BVPO_ROOT" in told
    code, told = run("slurm.sbatch", "x.yaml", env=slurm)
    assert code == 2 and "--gpus-per-node 8" in told
    code, told = run("slurm.sbatch", "x.yaml", env={**slurm, "BVPO_GPUS": "1", "BVPO_IMAGE": "/no/image.sif"})
    assert code == 2 and "there is no /no/image.sif" in told
    code, told = run("slurm.sbatch", "x.yaml", env={**slurm, "BVPO_GPUS": "1"})
    assert code == 0, told


def sbatch_with(
    tmp_path: Path,
    srun: str,
    *,
    given: tuple[str, ...] = ("x.yaml",),
    restarts: int = 0,
    moved: bool = True,
    state: str = "RUNNING",
    squeue: str = "",
    scontrol: str = "",
    **more: str,
) -> str:
    """Runs slurm.sbatch with stand-ins for Slurm's programs; what it and they print."""
    run_dir = tmp_path / "run"
    run_dir.mkdir(exist_ok=True)
    save = f"ln -sfn checkpoint-8 {run_dir}/last-checkpoint; " if moved else ""
    programs = {
        "srun": f"{save}{srun}",
        "squeue": squeue or f'case "$*" in *%T*) echo {state};; *) echo 0:06;; esac',
        "scontrol": f"""case "$1" in requeue) {scontrol or 'echo "REQUEUED $2"'};; *) echo n0;; esac""",
        "sleep": 'exec /bin/sleep "$(echo "$1" | sed s/^3$/0.1/)"',  # between two questions to Slurm
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_NODELIST": "n0",
        "SLURM_JOB_NUM_NODES": "1",
        "SLURM_RESTART_COUNT": str(restarts),
        "BVPO_GPUS": "1",
        "BVPO_RUN_DIR": str(run_dir),
        **more,
    }
    done = subprocess.run(
        [str(ROOT / "launch" / "slurm.sbatch"), *given], env=env, capture_output=True, text=True, timeout=60
    )
    return f"{done.stdout}{done.stderr}exit {done.returncode}"


def asks(tmp_path: Path, code: int = 75) -> str:
    """An srun whose supervisor was sent a signal."""
    return f"echo SIGUSR1 >{tmp_path}/run/stop; exit {code}"


def forget(tmp_path: Path) -> None:
    (tmp_path / "run" / "last-checkpoint").unlink(missing_ok=True)
    shutil.rmtree(tmp_path / "run" / "logs", ignore_errors=True)


def test_when_a_job_goes_back_into_the_queue(tmp_path):
    told = sbatch_with(tmp_path, asks(tmp_path))
    assert "REQUEUED 7" in told and "stopped and saved; the job goes back into the queue and will go on from" in told
    forget(tmp_path)
    assert "REQUEUED 7" in sbatch_with(tmp_path, "exit 76")
    told = sbatch_with(tmp_path, asks(tmp_path), restarts=1)
    assert "REQUEUED" not in told and "saved nothing new" in told, (
        "the same checkpoint as before: it would go on forever"
    )
    for srun, code in (("exit 3", 3), ("exit 1", 1), ("exit 0", 0)):
        told = sbatch_with(tmp_path, srun)
        assert "REQUEUED" not in told and told.endswith(f"exit {code}")
    forget(tmp_path)
    assert "REQUEUED" not in sbatch_with(tmp_path, asks(tmp_path), state="COMPLETING"), "scancel means it"
    forget(tmp_path)
    assert "REQUEUED" not in sbatch_with(tmp_path, asks(tmp_path), restarts=50)


def test_a_user_s_stop_ends_the_job(tmp_path):
    told = sbatch_with(tmp_path, f"touch {tmp_path}/run/stop; exit 75")
    assert "REQUEUED" not in told and "stopped at your request" in told and told.endswith("exit 75")
    forget(tmp_path)
    # The time limit's signal comes when the user has asked already.
    signal = "kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"
    told = sbatch_with(tmp_path, f"touch {tmp_path}/run/stop; {signal}; sleep 1; exit 75")
    assert "SIGUSR1 after" in told and "REQUEUED" not in told and told.endswith("exit 75")


def test_a_node_that_is_lost_before_the_first_save_gets_one_more_try(tmp_path):
    told = sbatch_with(tmp_path, "exit 76", moved=False)
    assert "REQUEUED 7" in told and "tries once more from the beginning" in told
    told = sbatch_with(tmp_path, "exit 76", moved=False, restarts=1)
    assert "REQUEUED" not in told and "tried twice" in told and told.endswith("exit 1")
    told = sbatch_with(tmp_path, "exit 76", restarts=1)
    assert "REQUEUED 7" in told and "will go on from checkpoint-8" in told
    told = sbatch_with(tmp_path, "exit 76", restarts=2)
    assert "REQUEUED 7" in told and "tries once more from checkpoint-8" in told, "there was progress in between"


def test_never_resume_holds_for_the_first_start_only(tmp_path):
    srun = 'echo "RESUME $BVPO_RESUME"; exit 76'
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last-checkpoint").symlink_to("checkpoint-4")  # of an earlier run
    assert "RESUME never" in sbatch_with(tmp_path, srun, moved=False, BVPO_RESUME="never")
    told = sbatch_with(tmp_path, srun, moved=False, restarts=1, BVPO_RESUME="never")
    assert "RESUME never" in told, "nothing of this job's own is saved yet, and checkpoint-4 is not wanted"
    (tmp_path / "run" / "last-checkpoint").unlink()
    (tmp_path / "run" / "last-checkpoint").symlink_to("checkpoint-8")
    told = sbatch_with(tmp_path, srun, moved=False, restarts=2, BVPO_RESUME="never")
    assert "RESUME auto" in told


def test_a_controller_that_does_not_answer_does_not_end_the_chain(tmp_path):
    told = sbatch_with(tmp_path, asks(tmp_path), squeue="exit 1")
    assert "REQUEUED 7" in told, "nothing is known of the job's state, so it is tried"
    forget(tmp_path)
    count = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) >{tmp_path}/n; "
    told = sbatch_with(tmp_path, asks(tmp_path), scontrol=count + '[ "$n" -ge 3 ] || exit 1; echo REQUEUED $2')
    assert "REQUEUED 7" in told and told.index("REQUEUED 7") < told.index("the job goes back"), "said when it is true"
    forget(tmp_path)
    told = sbatch_with(tmp_path, asks(tmp_path), scontrol="exit 1")
    assert "Slurm does not take the job back" in told and "goes back" not in told and told.endswith("exit 1")
    forget(tmp_path)
    signal = "kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"
    end = str(int(time.time()) + 8)
    told = sbatch_with(tmp_path, f"{signal}; exec >/dev/null 2>&1; sleep 9", squeue="exit 1", SLURM_JOB_END_TIME=end)
    assert "the save did not end in time" in told and "REQUEUED 7" in told, "the time left is known from the start"


def test_srun_is_called_so_that_ranks_may_use_all_cores(tmp_path):
    told = sbatch_with(tmp_path, 'echo "ARGS $* CPUS ${SRUN_CPUS_PER_TASK:-none}"', SLURM_CPUS_PER_TASK="64")
    words = told.split("ARGS ")[1].split("\n")[0]
    assert "--cpu-bind=none" in words and "--kill-on-bad-exit=0" in words and "--ntasks=1" in words
    assert words.endswith("CPUS 64")
    assert "CPUS none" in sbatch_with(tmp_path, 'echo "CPUS ${SRUN_CPUS_PER_TASK:-none}"')


def test_node_0_s_summary_decides_and_not_srun_s_largest_code(tmp_path):
    logs = tmp_path / "run" / "logs" / "slurm-7-0"
    summary = json.dumps({"outcome": "lost", "code": 76, "nodes": [{"node": "n1", "code": 137}]}, indent=1)
    (tmp_path / "summary").write_text(summary)
    told = sbatch_with(tmp_path, f"mkdir -p {logs}; cp {tmp_path}/summary {logs}/summary.json; exit 137")
    assert "a node was lost" in told and "REQUEUED 7" in told
    forget(tmp_path)
    logs.mkdir(parents=True)
    (logs / "summary.json").write_text(summary)  # of an older job
    told = sbatch_with(tmp_path, "exit 137")
    assert "REQUEUED" not in told and told.endswith("exit 137")
    assert "summary.json" not in told, "there is none"


def test_a_job_that_only_checks_finishes_no_run(tmp_path):
    told = sbatch_with(tmp_path, "exit 0", BVPO_PREFLIGHT="only")
    assert "nothing was trained" in told and "finished" not in told


def test_a_signal_during_the_setting_up_is_not_lost(tmp_path):
    """Before there is a run: the first call of scontrol."""
    srun = f"cat {tmp_path}/run/stop; exit 75"
    # The batch shell is two above: scontrol runs in a pipe of a $( … ).
    kill = "kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"
    told = sbatch_with(tmp_path, srun, scontrol=f'echo "REQUEUED $2";; show) [ "$2" != hostnames ] || {kill}; echo n0')
    assert "SIGUSR1 after" in told and "\nSIGUSR1\n" in told and "REQUEUED 7" in told


def test_the_run_folder(tmp_path):
    """As train.sh chooses it (test_how_a_run_goes_on), made absolute."""
    (tmp_path / "launch").mkdir()
    shutil.copy(ROOT / "launch" / "train.sh", tmp_path / "launch")
    config = tmp_path / "small.yaml"

    def folder(*flags: str, **env: str) -> str:
        env = {"SLURM_SUBMIT_DIR": str(tmp_path), "BVPO_RUN_DIR": "", **env}
        told = sbatch_with(tmp_path, "exit 0", given=("small.yaml", *flags), moved=False, **env)
        return told.split("run folder ")[1].split(", last-checkpoint")[0]

    config.write_text("model: m\n")
    assert folder() == f"{tmp_path}/runs/small"
    config.write_text("model: m\noutput_dir: 'out/a'   # here\n")
    assert folder() == f"{tmp_path}/out/a"
    assert folder("--output_dir", "b") == f"{tmp_path}/b" == folder("--output_dir=b")
    assert folder(BVPO_RUN_DIR=str(tmp_path / "c")) == f"{tmp_path}/c"


def test_in_an_image(tmp_path):
    """What Apptainer is called with; inside, the image's own scripts come before the checkout's."""
    image, apptainer = tmp_path / "bvpo.sif", tmp_path / "apptainer"
    image.touch()
    told = "python ${BVPO_PYTHON_BIN:-none}${PYTHONPATH:-}${PYTHONHOME:-}. cuda ${CUDA_HOME:-}${CUDA_PATH:-}${!NVTE_@}."
    apptainer.write_text(f'#!/bin/bash\nprintf "<%s>" "$@"; echo "{told}"\n')
    apptainer.chmod(0o755)
    srun = 'while [[ $1 == --* ]]; do shift; done; exec "$@"'
    given = {
        "BVPO_IMAGE": str(image),
        "BVPO_BINDS": "/data",
        "BVPO_DATA_CACHE": str(tmp_path / "rows"),
        "BVPO_PYTHON_BIN": "/host/python",
    }
    given |= {"PYTHONPATH": "/host/site", "PYTHONHOME": "/host"}
    given |= {"CUDA_HOME": "/host/cuda", "CUDA_PATH": "/host/cuda", "NVTE_FUSED_ATTN": "0"}
    told = sbatch_with(tmp_path, srun, **given)
    binds = f"<--bind><{ROOT},{ROOT},{tmp_path / 'run'},{tmp_path / 'rows'},/data>"
    assert f"<exec><--nv><--no-home>{binds}<--pwd><{ROOT}><{image}><bash><-c>" in told
    inside = f"<{ROOT}/launch/train.sh><x.yaml>python none. cuda ."
    assert inside in told, "the host's Python and CUDA are not in the image"
    assert "not passed into the image: CUDA_HOME CUDA_PATH NVTE_FUSED_ATTN (" in told
    assert "<exec><--no-home>" in sbatch_with(tmp_path, srun, **given, BVPO_REHEARSAL="1")


def test_a_signal_asks_for_a_save_and_a_save_that_hangs_is_not_waited_for(tmp_path):
    stop = tmp_path / "run" / "stop"
    # The batch shell, as Slurm's B: does; srun is its grandchild.
    signal = "kill -USR1 $(cut -d' ' -f4 /proc/$PPID/stat)"
    asked = f"{signal}; while [ ! -e {stop} ]; do sleep 0.1; done; exit 75"
    told = sbatch_with(tmp_path, asked)
    assert "SIGUSR1 after" in told and "stopped and saved" in told and "REQUEUED 7" in told
    forget(tmp_path)
    told = sbatch_with(tmp_path, f"{signal}; exit 75")  # it ends while the signal is being dealt with
    assert "stopped and saved" in told and told.endswith("exit 75"), told
    (tmp_path / "run" / "last-checkpoint").unlink()
    told = sbatch_with(tmp_path, f"{signal}; exec >/dev/null 2>&1; sleep 9")
    assert "the save did not end in time" in told and "REQUEUED 7" in told  # 6 s are left, so after 3
