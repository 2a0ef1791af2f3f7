"""The image's definition, locks and scripts, as far as they can be checked without building one.

tests/cluster/image.sh builds the CPU profile for real.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from megatron_bvpo.launching.versions import SUPPORTED

ROOT = Path(__file__).parents[2]
CONTAINERS = ROOT / "containers"
DEFINITION = (CONTAINERS / "bvpo.def").read_text()
LOCKS = sorted(CONTAINERS.glob("lock-*.txt"))
SCRIPTS = sorted(CONTAINERS.glob("*.sh")) + [ROOT / "tests" / "cluster" / "image.sh"]


def load_labels():
    spec = importlib.util.spec_from_file_location("bvpo_image_labels", CONTAINERS / "labels.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


labels = load_labels()


def sections(text: str) -> dict[str, str]:
    """Section name → body; "header" is what stands before the first."""
    parts = re.split(r"^%(\w+)[^\n]*\n", text, flags=re.MULTILINE)
    return {"header": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def arguments() -> dict[str, str]:
    return dict(re.findall(r"^\s*(\w+)=(.*)$", sections(DEFINITION)["arguments"], re.MULTILINE))


def lock_entries(lock: Path) -> dict[str, list[str]]:
    """`name==version` → its hashes."""
    entries, current = {}, None
    for line in lock.read_text().splitlines():
        if re.match(r"[A-Za-z0-9]", line):
            current = entries.setdefault(line.split()[0], [])
        current is None or current.extend(re.findall(r"--hash=sha256:([0-9a-f]{64})(?:\s|$)", line))
    return entries


def test_apptainer_sh_that_is_told_to_use_itself_looks_further(tmp_path):
    """slurm.sbatch exports BVPO_APPTAINER; named there, the script would start itself for ever."""
    program = tmp_path / "apptainer"
    program.write_text('#!/bin/sh\necho "found: $*"\n')
    program.chmod(0o755)
    itself = CONTAINERS / "apptainer.sh"
    for name, folder in ((str(itself), tmp_path), ("./apptainer.sh", CONTAINERS), ("apptainer.sh", tmp_path)):
        env = {"PATH": f"{tmp_path}:{CONTAINERS}:{os.environ['PATH']}", "BVPO_APPTAINER": name}
        done = subprocess.run(
            ["bash", str(itself), "exec", "IMAGE"], env=env, cwd=folder, capture_output=True, text=True, timeout=20
        )
        assert (done.returncode, done.stdout) == (0, "found: exec IMAGE\n"), done.stderr


def pins(profile: str) -> dict[str, str]:
    return labels.locked(CONTAINERS / f"lock-{profile}.txt")


def test_the_definition_has_all_sections():
    found = sections(DEFINITION)
    assert found["header"].splitlines()[:2] == ["Bootstrap: {{ bootstrap }}", "From: {{ base }}"]
    wanted = {"arguments", "files", "post", "environment", "labels", "runscript", "test", "help"}
    assert wanted <= set(found)


def test_every_build_argument_has_a_default_and_is_used_and_documented():
    used = set(re.findall(r"\{\{ (\w+) \}\}", DEFINITION))
    assert used == set(arguments())
    page = (ROOT / "docs" / "containers.md").read_text()
    undocumented = [name for name in used if f"`{name}`" not in page]
    assert not undocumented, f"docs/containers.md does not mention the build arguments {undocumented}"


def test_the_gpu_base_is_pinned_by_digest():
    # A reference with both a tag and a digest is refused by Apptainer's docker source.
    assert re.fullmatch(r"[a-z0-9./-]+@sha256:[0-9a-f]{64}", arguments()["base"])
    assert re.fullmatch(r"[0-9a-f]{40}", arguments()["apex_commit"])


def test_both_profiles_have_the_same_post_body():
    post = sections(DEFINITION)["post"]
    commands = [line.strip() for line in post.splitlines() if line.strip() and not line.strip().startswith("export ")]
    assert commands == ["exec bash /opt/bvpo/source/containers/post.sh"]


def test_every_file_that_the_image_takes_exists():
    for line in sections(DEFINITION)["files"].splitlines():
        if line.strip():
            source, target = line.split()
            assert (ROOT / source).exists(), source
            assert target == f"/opt/bvpo/source/{source}"


def test_every_build_argument_reaches_post_sh():
    exported = dict(re.findall(r'(\w+)="\{\{ (\w+) \}\}"', sections(DEFINITION)["post"]))
    text = (CONTAINERS / "post.sh").read_text()
    for variable in exported:
        assert re.search(rf"\$\{{?{variable}\b", text) or f" {variable} " in text, variable
    assert set(exported.values()) == set(arguments()) - {"bootstrap", "base"}


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.stem)
def test_every_pin_has_a_hash_and_names_no_host(lock):
    entries = lock_entries(lock)
    assert len(entries) > 20
    assert [pin for pin, hashes in entries.items() if not hashes] == []
    assert [pin for pin in entries if not re.match(r"[A-Za-z0-9._-]+(\[[^\]]*\])?==[^=\s]+$", pin)] == []
    assert "://" not in lock.read_text() and "--find-links" not in lock.read_text()


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_locks_hold_the_versions_that_were_tested(profile):
    found = pins(profile)
    for row in SUPPORTED:
        if row.marker and "<" in row.marker and profile == "gpu":
            continue  # the GPU profile has Python 3.12
        if row.marker and ">=" in row.marker and profile == "cpu":
            continue
        assert row.requirement().specifier.contains(found[row.package].partition("+")[0]), row.package
        # torch brings its own triton where it has CUDA.
        if (profile, row.package) != ("gpu", "triton"):
            assert found[row.package].partition("+")[0] == row.tested, row.package


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_locks_satisfy_pyproject(profile):
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = pins(profile)
    python = {"cpu": "3.11", "gpu": "3.12"}[profile]
    extras = project["optional-dependencies"]
    for text in project["dependencies"] + extras["rehearsal"] + extras["test"]:
        wanted = Requirement(text)
        environment = {"python_version": python, "platform_system": "Linux"}
        if wanted.marker and not wanted.marker.evaluate(environment):
            continue
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        assert wanted.specifier.contains(found[name], prereleases=True), text


def test_what_post_sh_compiles_is_in_the_gpu_lock_alone():
    compiled = re.search(r'^FROM_SOURCE="([^"]+)"$', (CONTAINERS / "post.sh").read_text(), re.MULTILINE)[1].split()
    assert compiled and all(name in pins("gpu") and name not in pins("cpu") for name in compiled)
    assert {"pip", "setuptools", "wheel", "hatchling"} <= set(pins("cpu")) & set(pins("gpu"))


def test_transformer_engine_is_built_without_nccls_expert_parallelism():
    """By default it wants a header that the base image need not have."""
    (build,) = [
        line for line in (CONTAINERS / "post.sh").read_text().splitlines() if "only transformer-engine-" in line
    ]
    assert "NVTE_WITH_NCCL_EP=0" in build and "NVTE_FRAMEWORK=pytorch" in build


def test_labels_are_the_locks_versions():
    lock = CONTAINERS / "lock-cpu.txt"
    found = pins("cpu")
    made = labels.labels(lock, installed=lambda name: found.get(name, "0.0.1"))
    assert made["org.megatron-bvpo.torch"] == found["torch"]
    assert made["org.opencontainers.image.version"] == "0.0.1"
    expected = {f"org.megatron-bvpo.{name}" for name in labels.LABELLED if name in found}
    assert expected == set(made) - {"org.megatron-bvpo.python", "org.opencontainers.image.version"}


def test_labels_refuse_another_version_and_a_missing_package():
    lock = CONTAINERS / "lock-cpu.txt"
    found = pins("cpu")

    def installed(name):
        if name == "trl":
            raise PackageNotFoundError(name)
        return "9.9.9" if name == "peft" else found.get(name, "0.0.1")

    with pytest.raises(SystemExit) as error:
        labels.labels(lock, installed=installed)
    assert f"peft: lock-cpu.txt says {found['peft']}, installed is 9.9.9" in str(error.value)
    assert "trl" in str(error.value) and "missing" in str(error.value)


def test_every_labelled_package_is_in_a_lock():
    assert [name for name in labels.LABELLED if name not in pins("gpu")] == []


@pytest.mark.parametrize("script", SCRIPTS + [CONTAINERS / "environment.sh"], ids=lambda path: path.name)
def test_shell_scripts_pass_shellcheck(script):
    program = shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed")
    done = subprocess.run([program, "-x", script.name], cwd=script.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_fail_hard(script):
    if script.name == "environment.sh":
        return  # sourced by others
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"BVPO_PROFILE": "tpu"}, "profile is cpu or gpu, not 'tpu'"),
        ({"BVPO_PROFILE": "cpu"}, "torch_index is empty"),
        ({"BVPO_PROFILE": "gpu", "BVPO_APEX_COMMIT": "main"}, "apex_commit: 40 hex digits, not 'main'"),
        ({"BVPO_PROFILE": "gpu", "BVPO_APEX_COMMIT": "0" * 40, "BVPO_CUDA_ARCH": "sm90"}, "cuda_arch: such as 9.0"),
    ],
)
def test_post_sh_refuses_bad_arguments_before_it_does_anything(settings, message):
    environment = {"PATH": os.environ["PATH"], **settings}
    done = subprocess.run(["bash", CONTAINERS / "post.sh"], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and message in done.stderr, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("arguments", "settings", "message"),
    [
        ([], {}, "say which profile"),
        (["gpu"], {"BVPO_BASE": "nvidia/cuda:13.0.3-cudnn-devel-ubuntu24.04"}, "has no digest"),
        (["cpu"], {"BVPO_TORCH_INDEX": "/nonexistent"}, "neither an address nor a folder"),
        (["cpu"], {"BVPO_TORCH_INDEX": "https://me:secret@example.org/simple"}, "holds a password"),
        (["cpu"], {"BVPO_PIP_CONF": "/nonexistent"}, "cannot be read"),
        # Through another machine's shell (here env starts it), the settings go along.
        (["cpu"], {"BVPO_BUILD_ON": "env", "BVPO_TORCH_INDEX": "/none such"}, "/none such is neither an address"),
        (["cpu", "/nonexistent/x.sif"], {}, "does not exist"),
    ],
)
def test_build_sh_refuses_bad_settings(arguments, settings, message, tmp_path):
    # BVPO_APPTAINER=false: should a check be gone, nothing is built.
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), "BVPO_APPTAINER": "false", **settings}
    command = ["bash", CONTAINERS / "build.sh", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert "secret" not in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def source_environment(tmp_path: Path, **settings: str) -> tuple[dict[str, str], str]:
    """The variables after environment.sh, and what it said."""
    script = f'. "{CONTAINERS / "environment.sh"}"; env -0'
    environment = {"PATH": os.environ["PATH"], "TMPDIR": str(tmp_path), **settings}
    done = subprocess.run(["sh", "-c", script], env=environment, capture_output=True, text=True, check=True)
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair), done.stderr


def test_environment_keeps_the_host_out_and_writes_to_the_cache(tmp_path):
    found, said = source_environment(tmp_path, HOME="/nonexistent", PYTHONPATH="/leak", HF_HOME="/not/bound")
    cache = Path(found["BVPO_CACHE"])
    assert cache.parent == tmp_path and (cache.stat().st_mode & 0o777) == 0o700
    assert "PYTHONPATH" not in found and found["PYTHONNOUSERSITE"] == "1"
    assert Path(found["HOME"]).is_dir() and found["HF_HUB_OFFLINE"] == "1"
    for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME", "HF_HOME", "MODELSCOPE_CACHE", "TORCHINDUCTOR_CACHE_DIR"):
        assert Path(found[name]).is_relative_to(cache), name
    assert "HF_HOME=/not/bound is not in the container" in said


def test_environment_keeps_a_bound_model_cache_and_a_writable_home(tmp_path):
    home, hub = tmp_path / "home", tmp_path / "hub"
    home.mkdir(), hub.mkdir()
    found, said = source_environment(tmp_path, HOME=str(home), HF_HOME=str(hub), HF_HUB_OFFLINE="0")
    assert (found["HOME"], found["HF_HOME"], found["HF_HUB_OFFLINE"], said) == (str(home), str(hub), "0", "")


def test_environment_sourced_twice_is_the_same_and_says_nothing(tmp_path):
    first, _ = source_environment(tmp_path)
    second, said = source_environment(tmp_path, **{k: v for k, v in first.items() if k not in ("_", "PWD", "SHLVL")})
    assert said == ""
    assert {k: v for k, v in first.items() if k != "_"} == {k: v for k, v in second.items() if k != "_"}


def test_a_temporary_folder_that_is_not_bound_is_not_used(tmp_path):
    found, _ = source_environment(tmp_path, TMPDIR="/not/bound", BVPO_CACHE=str(tmp_path / "mine"))
    assert "TMPDIR" not in found and found["TRITON_CACHE_DIR"] == str(tmp_path / "mine" / "triton")


def test_a_cache_that_cannot_be_written_is_a_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    environment = {"PATH": os.environ["PATH"], "BVPO_CACHE": str(tmp_path / "file" / "cache")}
    command = ["sh", "-c", f'. "{CONTAINERS / "environment.sh"}"; echo started']
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "BVPO_CACHE=" in done.stderr and "started" not in done.stdout
