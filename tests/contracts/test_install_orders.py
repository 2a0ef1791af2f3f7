"""Our wheel and ms-swift in either order, reinstalled, upgraded and removed, in a venv of their own.

ms-swift is here a wheel of a few small files that start nothing and print instead; its real command line is
in test_route.py. Under test are the .pth and the hook, which know no more of ms-swift than these files.
"""

import importlib.util
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

MAIN = """
import importlib.util, sys
ROUTE_MAPPING = {"sft": "swift.cli.sft", "rlhf": "swift.cli.rlhf"}

def parse_yaml_args(argv):
    pass

def cli_main(route_mapping=None, is_megatron=False):
    name = (route_mapping or ROUTE_MAPPING)[sys.argv[1]]
    print("VERSION", importlib.util.find_spec(name).name, *sys.argv[2:])
"""


def fake_swift(folder: Path, version: str) -> Path:
    """A wheel of ms-swift's name and module layout, written by hand."""
    info = f"ms_swift-{version}.dist-info"
    files = {
        "swift/__init__.py": "",
        "swift/cli/__init__.py": "",
        "swift/cli/main.py": MAIN.replace("VERSION", version),
        "swift/cli/sft.py": "",
        "swift/cli/rlhf.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: ms-swift\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/entry_points.txt": "[console_scripts]\nswift = swift.cli.main:cli_main\n",
    }
    record = "".join(f"{name},,\n" for name in [*files, f"{info}/RECORD"])
    path = folder / f"ms_swift-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in {**files, f"{info}/RECORD": record}.items():
            wheel.writestr(name, content)
    return path


def pip(*arguments) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheels(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("wheels")
    # With hatchling here the build needs no index; without it pip fetches it as for any user.
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    pip("wheel", "--no-deps", *isolation, "-w", folder, ROOT)
    return {
        "ours": next(folder.glob("megatron_bvpo-*.whl")),
        "swift": fake_swift(folder, "4.6.0"),
        "newer swift": fake_swift(folder, "4.6.9"),
    }


class Environment:
    """An empty venv, and what `swift` says in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        venv.create(folder, with_pip=False)
        self.site = next(folder.glob("lib/python*/site-packages"))

    def install(self, *arguments) -> None:
        pip("--python", self.folder, "install", "--no-deps", "--force-reinstall", *arguments)

    def uninstall(self, name: str) -> None:
        pip("--python", self.folder, "uninstall", "-y", name)

    def files(self) -> set[str]:
        found = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}
        return {name for name in found if "__pycache__" not in name}

    def swift(self, *arguments: str) -> str:
        done = subprocess.run(
            [self.folder / "bin" / "swift", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            cwd=self.folder,
            env={"BVPO_REHEARSAL": "1"},  # nothing is checked, so that the venv needs no packages
        )
        assert done.stderr == ""
        return done.stdout.strip()

    def check(self, version: str, routed: bool) -> None:
        ours = self.swift("rlhf", "--megatron", "--model", "m")
        assert ours == (
            f"{version} megatron_bvpo.cli --model m" if routed else f"{version} swift.cli.rlhf --megatron --model m"
        )
        assert self.swift("sft", "--model", "m") == f"{version} swift.cli.sft --model m"
        assert self.swift("rlhf", "--model", "m") == f"{version} swift.cli.rlhf --model m"


@pytest.fixture
def environment(tmp_path) -> Environment:
    return Environment(tmp_path / "venv")


def test_swift_first_then_ours_then_a_newer_swift_then_ours_gone(environment, wheels):
    environment.install(wheels["swift"])
    before = environment.files()
    environment.check("4.6.0", routed=False)
    environment.install(wheels["ours"])
    environment.check("4.6.0", routed=True)
    environment.install(wheels["swift"])
    environment.check("4.6.0", routed=True)
    environment.install(wheels["newer swift"])
    environment.check("4.6.9", routed=True)
    environment.install(wheels["swift"])
    environment.uninstall("megatron-bvpo")
    environment.check("4.6.0", routed=False)
    assert environment.files() == before


def test_ours_first_then_swift_then_swift_gone(environment, wheels):
    environment.install(wheels["ours"])
    environment.install(wheels["swift"])
    environment.check("4.6.0", routed=True)
    environment.uninstall("ms-swift")
    python = [environment.folder / "bin" / "python", "-c", "import megatron_bvpo"]
    done = subprocess.run(python, capture_output=True, text=True, timeout=60, cwd=environment.folder)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_editable_install_routes_too(environment, wheels):
    isolation = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    environment.install(wheels["swift"])
    before = environment.files()
    environment.install(*isolation, "-e", ROOT)
    environment.check("4.6.0", routed=True)
    environment.uninstall("megatron-bvpo")
    environment.check("4.6.0", routed=False)
    assert environment.files() == before


@pytest.mark.parametrize("damage", ["", "raise RuntimeError('broken')", "not python"])
def test_a_missing_or_broken_hook_says_nothing_at_start(environment, wheels, damage):
    environment.install(wheels["ours"])
    hook = environment.site / "_megatron_bvpo_route.py"
    assert hook.exists()
    hook.write_text(damage) if damage else hook.unlink()
    python = [environment.folder / "bin" / "python", "-c", "pass"]
    done = subprocess.run(python, capture_output=True, text=True, timeout=60, cwd=environment.folder)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_half_removed_package_leaves_swift_alone(environment, wheels):
    environment.install(wheels["swift"], wheels["ours"])
    (environment.site / "megatron_bvpo").rename(environment.folder / "away")
    environment.check("4.6.0", routed=False)


def test_the_hook_loads_nothing_but_itself(environment, wheels):
    """A start of Python pays for one small module: no import that a bare Python does not make."""
    code = "import sys; print(*sorted(sys.modules))"
    python = [environment.folder / "bin" / "python", "-c", code]

    def modules() -> set[str]:
        done = subprocess.run(python, capture_output=True, text=True, timeout=60, cwd=environment.folder)
        return set(done.stdout.split())

    before = modules()
    environment.install(wheels["ours"])
    assert modules() - before == {"_megatron_bvpo_route"}
