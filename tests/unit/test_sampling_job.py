"""A sampling job: its file as flags, the engine's command, launch/sample.sbatch with stand-ins for Slurm's programs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_bvpo.errors import UserError
from megatron_bvpo.sampling.asking import job_file

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ("out", "model", "samples", "modes", "judge", "limit", "api_key_file", "match", "temperature", "server")
KNOWN += ("extra_body",)
JOB = """\
prompts: [a.jsonl, b.jsonl]
out: samples
model: some/model
modes: [thinking, empty]
temperature: 0.8
match: true
extra_body: {top_k: 20}
limit:
engine:
  tensor-parallel-size: 8
  enable_expert_parallel: true
  enforce_eager: false
  hf_overrides: {rope_theta: 1}
"""


@pytest.fixture
def job(tmp_path) -> str:
    (tmp_path / "job.yaml").write_text(JOB)
    return str(tmp_path / "job.yaml")


def test_a_file_becomes_flags_and_the_command_line_comes_last(job):
    words = job_file.unroll([job, "--temperature", "1"], KNOWN)
    assert words[:2] == ["a.jsonl", "b.jsonl"] and words[-2:] == ["--temperature", "1"]
    told = "--out samples --model some/model --modes thinking empty --temperature 0.8 --match --extra_body".split()
    assert words[2:-2] == [*told, '{"top_k": 20}']


def test_prompts_of_the_command_line_take_the_place_of_the_file_s(job):
    assert job_file.unroll([job, "c.jsonl", "--limit", "3"], KNOWN)[:2] == ["c.jsonl", "--out"]


def test_without_a_file_nothing_changes():
    assert job_file.unroll(["a.jsonl", "--out", "x.yaml"], KNOWN) == ["a.jsonl", "--out", "x.yaml"]


def test_the_engine_s_command(job):
    words = job_file.engine_command(job_file.read_line([job]), 8001)
    assert words[:7] == "vllm serve some/model --host 0.0.0.0 --port 8001".split()
    assert words[7:] == [
        "--tensor-parallel-size",
        "8",
        "--enable-expert-parallel",
        "--hf-overrides",
        '{"rope_theta": 1}',
    ]
    assert job_file.engine_command(job_file.read_line([job, "--model", "another"]), 8001)[2] == "another"


def test_another_command_and_flags_of_the_engine(job):
    """What the engine loads is the file's model, or --engine.model; an evaluation may ask for an adapter's name."""
    words = "--engine.lora_modules a=A b=B --engine.enable_lora --engine.tensor-parallel-size=2"
    line = job_file.read_line([job, *words.split(), *"-- bvpo eval --model a --out e".split()])
    assert (line.model, line.client, line.out) == ("some/model", "eval --model a --out e".split(), "e")
    assert line.engine["lora_modules"] == ["a=A", "b=B"] and line.engine["enable_lora"] is True
    assert line.engine["tensor_parallel_size"] == "2" and line.engine["enable_expert_parallel"] is True
    line = job_file.read_line([job, "--engine.model", "merged", "--limit", "3"])
    assert (line.model, line.client, line.out) == ("merged", ["sample", job, "--limit", "3"], "samples")


@pytest.mark.parametrize(
    "text, told",
    [
        (JOB + "temprature: 1\n", "temprature: is no flag of bvpo sample; write temperature"),
        ("engine: [a]\n", "engine: is no mapping"),
        ("engine: {port: 3}\n", "engine.port: is set by launch/sample.sbatch"),
        ("engine: {model: m}\n", "write `model: NAME` outside of engine"),
        ("a: [\n", "is no valid YAML"),
        ("model: m\n", "prompts: is missing; add `prompts: FILE`"),
    ],
)
def test_a_file_that_is_wrong_is_named(tmp_path, text, told):
    file = tmp_path / "job.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as caught:
        job_file.unroll([str(file)], KNOWN)
    assert told in str(caught.value) and str(file) in str(caught.value)


def test_a_missing_model_is_named(tmp_path):
    file = tmp_path / "job.yaml"
    file.write_text("modes: [empty]\n")
    with pytest.raises(UserError, match="model: is missing"):
        job_file.read_line([str(file)])


# --- sample.sbatch ---

ENGINE = f"""exec {sys.executable} -c '
import http.server, os
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def log_message(self, *_): pass
print("key", os.environ["VLLM_API_KEY"], flush=True)
http.server.HTTPServer(("127.0.0.1", int(os.environ["BVPO_ENGINE_PORT"])), Health).serve_forever()'"""
# The Python that sample.sbatch calls: itself for everything but `bvpo sample`, whose words and key it prints.
CLIENT = """#!/bin/bash
if [ "$1" = -c ] && [[ "$3" =~ ^(sample|eval)$ ]]; then
  shift 2; echo "CLIENT $*"; echo "KEY $OPENAI_API_KEY"
  mkdir -p {out}/journal; {does}
fi
exec {python} "$@"
"""


def sbatch(tmp_path: Path, job: str, does: str, *given: str, port: int, wrong: bool = False, **more: str) -> str:
    """What launch/sample.sbatch prints; `does` is what the client does."""
    out = tmp_path / "samples"
    programs = {
        # The options of srun come before the command; the node's task runs as a child, as under Slurm.
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": 'case "$1" in requeue) echo "REQUEUED $2";; *) [ "$2" = hostnames ] && echo n0 || '
        'echo "NodeAddr=127.0.0.1 x";; esac',
        "client": CLIENT.format(out=out, does=does, python=sys.executable),
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(body if body.startswith("#!") else f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "7",
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_NODELIST": "n0",
        "BVPO_ROOT": str(ROOT),
        "BVPO_PYTHON_BIN": str(tmp_path / "client"),
        "BVPO_ENGINE_COMMAND": "echo no GPU; exit 3" if wrong else ENGINE,
        "BVPO_ENGINE_PORT": str(port),
        "BVPO_ENGINE_RESTARTS": "0",
        **more,
    }
    done = subprocess.run(
        [str(ROOT / "launch" / "sample.sbatch"), job, *given], env=env, capture_output=True, text=True, timeout=60
    )
    assert "unbound variable" not in done.stderr and "Traceback" not in done.stderr, done.stderr
    return f"{done.stdout}{done.stderr}exit {done.returncode}"


@pytest.fixture
def port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def test_it_starts_engines_samples_and_ends_them(tmp_path, job, port):
    told = sbatch(tmp_path, job, "exit 0", "--limit", "3", port=port)
    assert f"CLIENT sample {job} --limit 3 --server http://127.0.0.1:{port}/v1\n" in told and told.endswith("exit 0")
    assert "1 of 1 engine(s) healthy" in told and "done: samples" in told
    (log,) = (tmp_path / "samples" / "logs" / "slurm-7-0").glob("engine-*.log")
    assert log.read_text().split()[1] == told.split("KEY ")[1].split()[0], "both have the job's key"
    assert subprocess.run(["bash", "-c", f"exec 3<>/dev/tcp/127.0.0.1/{port}"], capture_output=True).returncode != 0


def test_an_evaluation_asks_the_engines(tmp_path, job, port):
    words = "--engine.model base --engine.served_model_name a -- bvpo eval --model a --out".split()
    says = 'print("loads", os.environ["BVPO_ENGINE_MODEL"], os.environ["BVPO_ENGINE_NAME"], flush=True); '
    command = ENGINE.replace('print("key"', f'{says}print("key"')
    out = str(tmp_path / "samples")
    told = sbatch(tmp_path, job, "exit 4", *words, out, port=port, BVPO_ENGINE_COMMAND=command)
    assert f"CLIENT eval --model a --out {out} --server http://127.0.0.1:{port}/v1\n" in told and told.endswith(
        "exit 4"
    )
    (log,) = (tmp_path / "samples" / "logs" / "slurm-7-0").glob("engine-*.log")
    assert "loads base a\n" in log.read_text() and "bvpo eval ended with code 4" in told


def test_answers_of_an_evaluation_count_as_going_on(tmp_path, job, port):
    """They lie a folder deeper than samples."""
    journal = tmp_path / "samples" / "answers" / "set" / "journal"
    asks = f"mkdir -p {journal}; trap 'echo more >>{journal}/x; exit 0' TERM; kill -USR1 $PPID; "
    asks += "while :; do sleep 0.1; done"
    words = "-- bvpo eval --model a --out".split()
    told = sbatch(tmp_path, job, asks, *words, str(tmp_path / "samples"), port=port)
    assert "REQUEUED 7" in told and told.endswith("exit 0")


def test_the_time_limit_ends_the_client_and_puts_the_job_back(tmp_path, job, port):
    asks = (
        "trap 'echo more >>{out}/journal/x.jsonl; exit 0' TERM; kill -USR1 $PPID; while :; do sleep 0.1; done"
    ).format(out=tmp_path / "samples")
    told = sbatch(tmp_path, job, asks, port=port)
    assert "SIGUSR1 after" in told and "REQUEUED 7" in told and told.endswith("exit 0")
    told = sbatch(tmp_path, job, asks, port=port, SLURM_RESTART_COUNT="50")
    assert "REQUEUED" not in told and "BVPO_MAX_RESTARTS" in told and told.endswith("exit 1")


def test_a_start_that_brought_nothing_does_not_come_back(tmp_path, job, port):
    told = sbatch(tmp_path, job, "kill -USR1 $PPID; trap 'exit 0' TERM; while :; do sleep 0.1; done", port=port)
    assert "brought no answer" in told and "REQUEUED" not in told and told.endswith("exit 1")


def test_the_client_s_code_is_the_job_s(tmp_path, job, port):
    assert sbatch(tmp_path, job, "exit 2", port=port).endswith("exit 2")


def test_an_engine_that_dies_shows_its_last_lines(tmp_path, job, port):
    told = sbatch(tmp_path, job, "exit 0", port=port, wrong=True)
    assert "ended with code 3" in told and "no GPU" in told and "no engine is left" in told and told.endswith("exit 2")


def test_an_engine_that_never_gets_healthy(tmp_path, job, port):
    told = sbatch(tmp_path, job, "exit 0", port=port, BVPO_ENGINE_COMMAND="sleep 60", BVPO_ENGINE_START_S="1")
    assert "no engine was healthy after 1 s" in told and told.endswith("exit 2")


def test_what_is_missing_is_said(tmp_path, job, port):
    def said(file=job, **more: str) -> str:
        return sbatch(tmp_path, file, "exit 0", port=port, **more)

    assert "submit this with sbatch" in said(SLURM_JOB_ID="")
    assert "there is no gone.yaml" in said("gone.yaml")
    assert "set BVPO_ROOT" in said(BVPO_ROOT=str(tmp_path))
    assert "there is no image /no.sif" in said(BVPO_ENGINE_IMAGE="/no.sif", BVPO_APPTAINER="x")
    (tmp_path / "job.yaml").write_text("model: m\n")
    assert "add `out: FOLDER`" in said()


def test_both_images(tmp_path, job, port):
    """What Apptainer is called with, for the engine and for the client."""
    apptainer = tmp_path / "apptainer"
    python = tmp_path / "client"
    # An `exec` runs what stands behind the image; the client's `python` is this test's.
    apptainer.write_text(
        f'#!/bin/bash\necho "APPTAINER $*" >&2\nuntil [[ $1 == *.sif ]]; do shift; done; shift\n'
        f'[ "$1" != python ] || {{ shift; exec {python} "$@"; }}\nexec "$@"\n'
    )
    apptainer.chmod(0o755)
    images = {"BVPO_IMAGE": str(tmp_path / "ours.sif"), "BVPO_ENGINE_IMAGE": str(tmp_path / "vllm.sif")}
    for image in images.values():
        Path(image).touch()
    told = sbatch(tmp_path, job, "exit 0", port=port, BVPO_APPTAINER=str(apptainer), BVPO_BINDS="/data", **images)
    assert f"--no-home --bind {ROOT},{tmp_path},/data --pwd {tmp_path} {images['BVPO_IMAGE']} python" in told
    (log,) = (tmp_path / "samples" / "logs" / "slurm-7-0").glob("engine-*.log")
    assert f"--nv --no-home --bind {tmp_path},/data --pwd {tmp_path} {images['BVPO_ENGINE_IMAGE']}" in log.read_text()
    assert "CLIENT sample" in told and told.endswith("exit 0")


def test_every_shipped_file_is_what_bvpo_sample_reads(tmp_path):
    from megatron_bvpo.sampling.asking.sample_command import with_job_file

    for file in sorted((ROOT / "configs").glob("sampling_*.yaml")):
        words = with_job_file(["sample", str(file), "--limit", "5"])
        assert words[:2] == ["sample", "prompts.jsonl"] and words[-2:] == ["--limit", "5"]
        assert words[words.index("--modes") + 1 :][:2] == ["thinking", "empty"]
