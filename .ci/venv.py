"""Make `.venv` hold the pinned packages and Shoal itself, once, and see quickly that it does.

Guarantees: an environment counts as complete only after everything in it is installed, so one that
was interrupted is thrown away by the next run; it is made anew when the pins, the dependencies, the
interpreter or the place change; two runs at once wait for each other. Progress goes to stderr, so
that the standard output of `make demo` stays the demo's. Does not guarantee the packages' hashes:
they come from wherever this machine's pip is configured to take them.

Used by the Makefile and by docker/Dockerfile. An old interpreter has to get as far as saying that
it is too old, so this file keeps to Python 3.6's grammar and imports nothing before that check.
"""

import sys

if sys.version_info < (3, 11):
    sys.exit(
        f"shoal: {sys.executable} is Python {sys.version.split()[0]}, and Shoal needs 3.11 or "
        "newer: install one and name it, as in `make demo PYTHON=python3.12`"
    )

import argparse
import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "constraints.txt"
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
HEAVY = ["torch", "transformers", "hivemind.dht.node", "grpc.aio", "aiohttp", "typer", "rich"]
BASE_PYTHON = getattr(sys, "_base_executable", None) or sys.executable  # never the venv's own


class InstallError(Exception):
    """One line for a person: what failed and how to mend it."""


def say(text: str) -> None:
    """One line for the person waiting."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201


class Environment:
    """One virtual environment and the note in it of what it was completed for."""

    def __init__(self, path: Path, torch: str) -> None:
        self.path = path
        self.torch = torch
        self.python = path / "bin" / "python"
        self.stamp = path / "complete"
        self.log = path / "install.log"
        self.lock = -1
        self.project = tomllib.loads(PYPROJECT.read_text("utf-8"))

    def key(self) -> str:
        """Digest of all that an environment depends on; tool settings in pyproject.toml do not."""
        parts = [
            CONSTRAINTS.read_text("utf-8"),
            Path(__file__).read_text("utf-8"),
            self.project["build-system"],
            self.project["project"],
            self.project["tool"]["hatch"],
            sys.version,
            sys.base_prefix,
            str(self.path),  # the scripts in bin/ name their interpreter by its full path
            str(ROOT),  # and the editable install names this checkout
            self.torch,
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def installed(self) -> set[str]:
        """Names of the parts known to be completely installed."""
        try:
            key, *parts = self.stamp.read_text("utf-8").split()
        except (OSError, ValueError):
            return set()
        return set(parts) if key == self.key() and self.python.exists() else set()

    def ensure(self, wanted: set[str]) -> None:
        """Install what of `wanted` is missing.

        Raises:
            InstallError: something could not be installed; the environment counts as incomplete.
        """
        if wanted <= self.installed():
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path.with_name(self.path.name + ".lock"), "w") as lock:
            self.lock = lock.fileno()
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                say("shoal: another make is installing here, waiting for it")
                fcntl.flock(lock, fcntl.LOCK_EX)
            have = self.installed()  # again: another run may just have finished
            if wanted <= have:
                return
            began = time.monotonic()
            if not have:
                self.create()
            self.stamp.unlink(missing_ok=True)
            self.install(wanted, have)
            fresh = self.stamp.with_name("complete.new")
            fresh.write_text(" ".join([self.key(), *sorted(wanted | have)]), "utf-8")
            fresh.replace(self.stamp)
            say(f"shoal: {self.path.name} is ready, {time.monotonic() - began:.0f} s")

    def create(self) -> None:
        """Start from nothing: packages of an earlier set of pins must not linger."""
        say(f"shoal: making {self.path} (once; some minutes and 1-2 GB, mostly torch)")
        if self.path.exists():
            shutil.rmtree(self.path)
        made = subprocess.run(
            [BASE_PYTHON, "-m", "venv", str(self.path)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        if made.returncode != 0:
            reason = made.stdout.strip()[-200:]
            if "ensurepip" in made.stdout:
                reason = "it lacks ensurepip"
            raise InstallError(
                f"{BASE_PYTHON} cannot make a virtual environment ({reason}): install its venv "
                "module (on Debian and Ubuntu: apt install python3-venv) or name another "
                "interpreter with PYTHON=..."
            )

    def install(self, wanted: set[str], have: set[str]) -> None:
        """Torch first, because it alone has a choice of builds; then the rest; then Shoal."""
        project = self.project["project"]
        if "run" not in have:
            self.install_torch()
            self.pip("packages", project["dependencies"])
            self.check_imports()
        for extra in sorted(wanted - have - {"run", "shoal"}):
            self.pip(f"{extra} packages", project["optional-dependencies"][extra])
        if "shoal" in wanted - have:
            self.pip("shoal itself", ["--no-deps", "--editable", str(ROOT)])

    def install_torch(self) -> None:
        """Leave the gigabytes of CUDA libraries out where nothing could use them."""
        pin = re.search(r"^torch==\S+$", CONSTRAINTS.read_text("utf-8"), re.MULTILINE)
        if pin is None:
            raise InstallError(f"{CONSTRAINTS.name} does not pin torch: add `torch==VERSION`")
        if self.torch == "pypi" or (self.torch == "auto" and has_gpu()) or sys.platform != "linux":
            return
        if self.configured_torch(pin.group()).endswith("+cpu"):
            return  # this machine's pip already finds a CPU build: nothing to arrange
        try:
            self.pip(
                "torch for the CPU",
                ["--no-deps", "--index-url", TORCH_CPU_INDEX, "--retries", "1", pin.group()],
            )
        except InstallError:
            if self.torch == "cpu":
                raise
            say("shoal: no CPU build of torch in reach, taking the large ordinary one")

    def configured_torch(self, pin: str) -> str:
        """Which version of torch this machine's pip would take by itself; empty if none."""
        report = subprocess.run(
            [*self.pip_command(), "-qq", "--dry-run", "--no-deps", "--report", "-", pin],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=pip_environment(),
            text=True,
            check=False,
        )
        if report.returncode != 0:
            return ""
        return str(json.loads(report.stdout)["install"][0]["metadata"]["version"])

    def check_imports(self) -> None:
        """Load what is heavy: a broken package shows now, and byte code for what is used is made.

        pip would compile every file of every package, which takes longer than installing them;
        nobody compiling would have the first four peers do it at the same time.
        """
        say("shoal: loading them once")
        loaded = subprocess.run(
            [str(self.python), "-I", "-c", f"import {', '.join(HEAVY)}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
        if loaded.returncode != 0:
            last = loaded.stderr.strip().splitlines()[-1:] or [f"exit {loaded.returncode}"]
            raise InstallError(f"the installed packages do not load here: {last[0]}")

    def pip_command(self) -> list[str]:
        """`-I`: neither PYTHONPATH nor the current folder may add packages."""
        return [str(self.python), "-I", "-m", "pip", "install", "--constraint", str(CONSTRAINTS)]

    def pip(self, what: str, arguments: list[str]) -> None:
        """Run pip: its whole output into the log, a glimpse of it to the person waiting."""
        say(f"shoal: installing {what}")
        tail: list[str] = []
        process = subprocess.Popen(
            [*self.pip_command(), "--no-compile", "--progress-bar", "off", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=pip_environment(),
            text=True,
            errors="replace",
            pass_fds=[self.lock],  # a pip that outlives us keeps the next run waiting
        )
        with process, open(self.log, "a", encoding="utf-8") as log:
            assert process.stdout is not None
            for line in process.stdout:
                log.write(line)
                tail = [*tail[-11:], line.rstrip()]
                glimpse(line)
        clear_glimpse()
        if process.returncode != 0:
            for line in tail:
                say(f"  {line}")
            raise InstallError(
                f"pip could not install {what}: its last lines are above, all of them in "
                f"{self.log}; is a package index in reach?"
            )


def pip_environment() -> dict[str, str]:
    """The machine's own pip settings hold, but for those that would install elsewhere."""
    return {**os.environ, "PIP_USER": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def glimpse(line: str) -> None:
    """On a terminal one changing line; in a log only what takes long."""
    found = re.match(r"\s*(Collecting|Downloading|Installing|Building)\b.*", line)
    if not found:
        return
    text = line.strip().replace("Installing collected packages: ", "unpacking ")
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 4
        print(f"\r\033[K  {text[:width]}", end="", file=sys.stderr, flush=True)  # noqa: T201
    elif re.search(r"\((\d{3,}|[2-9]\d)(\.\d+)? MB\)|\(\d+(\.\d+)? GB\)", text):
        say(f"  {text}")


def clear_glimpse() -> None:
    """Leave no half line behind."""
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)  # noqa: T201


def has_gpu() -> bool:
    """Whether an NVIDIA driver is here, also the one that Windows lends to its Linux subsystem."""
    signs = ["/proc/driver/nvidia", "/dev/nvidiactl", "/dev/dxg"]
    return any(os.path.exists(sign) for sign in signs) or bool(shutil.which("nvidia-smi"))


def main() -> int:
    """Command line of the Makefile and the Dockerfile."""
    parser = argparse.ArgumentParser(description="Create or complete the virtual environment.")
    parser.add_argument("extras", nargs="*", help="optional dependencies to add, such as dev")
    parser.add_argument("--path", type=Path, default=ROOT / ".venv")
    parser.add_argument("--torch", choices=["auto", "cpu", "pypi"], default="auto")
    parser.add_argument("--without-shoal", action="store_true", help="only what Shoal needs")
    options = parser.parse_args()
    wanted = {"run", *options.extras} | (set() if options.without_shoal else {"shoal"})
    try:
        Environment(options.path.absolute(), options.torch).ensure(wanted)
    except InstallError as error:
        say(f"shoal: {error}")
        return 2
    except OSError as error:
        say(f"shoal: the environment cannot be written: {error}")
        return 2
    except KeyboardInterrupt:
        clear_glimpse()
        say("shoal: interrupted; the next run starts the environment afresh")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
