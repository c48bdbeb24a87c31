# SPDX-License-Identifier: Apache-2.0
"""The package as a whole: what it declares is there, the algorithm is free of ROS, and nothing unsafe is in it."""

from __future__ import annotations

import ast
import functools
import importlib.util
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest

import kfloc_ros

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "kfloc_ros"

ROS_SIDE = ("nodes/", "replay/", "cli/replay.py")
"""Where ROS may be imported: the nodes, and what starts and records them."""

ROS_MODULES = re.compile(
    r"(rclpy|launch|launch_ros|tf2_ros|tf2_py|cv_bridge|message_filters|tf_transformations|ament_index_python"
    r"|builtin_interfaces|rosgraph_msgs|rcl_interfaces|std_srvs|[a-z0-9_]+_msgs)(\.|$)"
)


def sources() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def relative(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def is_ros_side(path: Path) -> bool:
    return relative(path).startswith(ROS_SIDE)


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module


def names_from(tree: ast.AST, module: str) -> Iterator[list[str]]:
    """Of every import of a module, the names that it brings; the module's own where it brings that."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ([alias.name] for alias in node.names if alias.name.split(".")[0] == module)
        elif isinstance(node, ast.ImportFrom) and node.module == module:
            yield [alias.name for alias in node.names]


@pytest.fixture(scope="module")
def manifest() -> ElementTree.Element:
    return ElementTree.parse(ROOT / "package.xml").getroot()


@pytest.fixture(scope="module")
def setup_text() -> str:
    return (ROOT / "setup.py").read_text(encoding="utf-8")


def test_one_version_everywhere(manifest: ElementTree.Element, setup_text: str) -> None:
    assert manifest.findtext("version") == kfloc_ros.__version__
    assert f'version="{kfloc_ros.__version__}"' in setup_text


def test_manifest_says_what_colcon_and_rosdep_read(manifest: ElementTree.Element) -> None:
    assert manifest.get("format") == "3"
    assert manifest.findtext("name") == "kfloc_ros"
    assert manifest.findtext("license") == "Apache-2.0"
    assert manifest.findtext("export/build_type") == "ament_python"
    assert (ROOT / "resource" / "kfloc_ros").is_file()


def test_every_ros_package_that_is_imported_is_in_the_manifest(manifest: ElementTree.Element) -> None:
    declared = {node.text for kind in ("depend", "exec_depend") for node in manifest.iter(kind)}
    files = [*sources(), *sorted((ROOT / "launch").glob("*.py"))]
    wanted = {name.split(".")[0] for path in files for name in imported(tree_of(path)) if ROS_MODULES.match(name)}
    # launch_ros and rclpy bring the first two themselves; kfloc_msgs is built only where the action is wanted.
    assert wanted - {"ament_index_python", "rcl_interfaces", "kfloc_msgs"} <= declared


def test_entry_points_exist_and_are_callable(setup_text: str) -> None:
    points = re.findall(r'"(\w+) = ([\w.]+):(\w+)"', setup_text)
    assert {name for name, _, _ in points} == {"kfloc", "camera_node", "filter_node", "refiner_node", "localizer"}
    for _, module, function in points:
        path = ROOT / (module.replace(".", "/") + ".py")
        tree = tree_of(path)
        assert any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body), path


def test_what_the_package_needs_besides_its_modules_is_installed_with_it(setup_text: str) -> None:
    """Weights and pages: every file below the package that is no module matches a pattern of its package data."""
    match = re.search(r"package_data=\{PACKAGE: (\[.*?\])\}", setup_text)
    assert match is not None
    packaged = {path for pattern in ast.literal_eval(match[1]) for path in PACKAGE.glob(pattern)}
    made = (".py", ".pyc", ".nbi", ".nbc")  # modules and what Python and Numba make of them
    others = {path for path in PACKAGE.rglob("*.*") if path.is_file() and path.suffix not in made}
    assert PACKAGE / "kfnet" / "weights" / "oflownet_fast.safetensors" in others
    assert others <= packaged


def ros_imports(path: Path) -> list[str]:
    return [name for name in imported(tree_of(path)) if ROS_MODULES.match(name)]


def test_algorithm_names_no_ros_module() -> None:
    algorithm = (path for path in sources() if not is_ros_side(path))
    assert {relative(path): names for path in algorithm if (names := ros_imports(path))} == {}


LAYERS = (
    "errors config device files jobs", "geometry", "types frames", "features", "messages", "bags", "pixloc",
    "pixloc/reference", "kfnet", "kfnet/reference", "relocalization", "maps", "localization", "simulation", "datasets",
    "evaluation", "mapping", "pixloc/hloc", "training", "visualization", "nodes", "replay", "cli",
)  # fmt: skip
"""Folders and root modules of the package; each imports only from its own layer and from the layers before it."""

RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names.split()}


def layer_of(module: str) -> str:
    """The most specific entry of ``LAYERS`` that holds a module, such as ``pixloc/reference``; empty for the root."""
    parts = module.removeprefix("kfloc_ros").strip(".").split(".")
    return next((name for n in (2, 1) if (name := "/".join(parts[:n])) in RANK), "/".join(parts[:1]))


def package_imports(path: Path) -> Iterator[tuple[str, str]]:
    """The (module, imported module) pairs of a file within the package, imports inside functions included."""
    own = "kfloc_ros." + relative(path).removesuffix(".py").replace("/", ".").removesuffix(".__init__")
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("kfloc_ros."):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                is_module = (ROOT / (inner.replace(".", "/") + ".py")).is_file()
                yield own, inner if is_module else node.module


def test_imports_run_from_later_layers_to_earlier_ones() -> None:
    assert {layer_of("kfloc_ros." + relative(path).removesuffix(".py").replace("/", ".")) for path in sources()} <= {
        *RANK,
        "__init__",
    }
    upward = [
        f"{own} imports {other}"
        for path in sources()
        for own, other in package_imports(path)
        if RANK[layer_of(other)] > RANK[layer_of(own)]
    ]
    assert upward == []


def test_no_modules_import_each_other_in_a_circle() -> None:
    edges: dict[str, set[str]] = {}
    for path in sources():
        for own, other in package_imports(path):
            edges.setdefault(own, set()).add(other)
    circles: list[str] = []
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        if module in trail:
            circles.append(" -> ".join((*trail[trail.index(module) :], module)))
        elif module not in done:
            for other in sorted(edges.get(module, ())):
                visit(other, (*trail, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())
    assert circles == []


def test_no_module_is_long() -> None:
    lengths = {relative(path): len(path.read_text(encoding="utf-8").splitlines()) for path in sources()}
    assert {name: length for name, length in lengths.items() if length > 350} == {}
    assert len(lengths) <= 289


def test_algorithm_imports_where_there_is_no_ros() -> None:
    modules = [
        "kfloc_ros." + relative(path)[: -len(".py")].replace("/", ".").removesuffix(".__init__")
        for path in sources()
        if not is_ros_side(path) and path.name != "__main__.py"
    ]
    modules = ["kfloc_ros" if name == "kfloc_ros.__init__" else name for name in modules]
    blocked = """
import importlib, sys
class NoRos:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("rclpy", "launch", "launch_ros", "tf2_ros") or name.split(".")[0].endswith("_msgs"):
            raise ImportError(f"{name} must not be imported here")
sys.meta_path.insert(0, NoRos())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""
    done = subprocess.run(
        [sys.executable, "-c", blocked, *modules], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def called(node: ast.Call) -> str:
    return ast.unparse(node.func)


def test_nothing_unsafe_is_called() -> None:
    offenders: list[str] = []
    for path in [*sources(), *sorted((ROOT / "scripts").glob("*.py")), *sorted((ROOT / "benchmarks").rglob("*.py"))]:
        tree = tree_of(path)
        unsafe = {"pickle", "marshal", "dill", "shelve"}.intersection(imported(tree))
        if "pickle" in unsafe and all(names == ["UnpicklingError"] for names in names_from(tree, "pickle")):
            unsafe.remove("pickle")  # what torch.load raises
        offenders += [f"{path.name}: imports {name}" for name in unsafe]
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            settings = {item.arg: ast.unparse(item.value) for item in call.keywords}
            name = called(call)
            if (
                name in ("eval", "exec", "os.system", "yaml.unsafe_load")
                or (name == "yaml.load" and settings.get("Loader") != "SafeLoader")
                or (name == "torch.load" and settings.get("weights_only") != "True")
                or (name.endswith("np.load") and settings.get("allow_pickle", "False") != "False")
                or settings.get("shell", "False") != "False"
            ):
                offenders.append(f"{path.name}:{call.lineno}: {ast.unparse(call)[:80]}")
    assert offenders == []


def test_every_source_names_its_licence() -> None:
    folders = ("kfloc_ros", "launch", "scripts", "test", "benchmarks", "underlay")
    files = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert files
    licence = "# SPDX-License-Identifier: Apache-2.0"
    assert [path for path in files if licence not in path.read_text(encoding="utf-8")[:200]] == []


@pytest.mark.skipif(
    shutil.which("git") is None or not (ROOT / ".git").exists(), reason="reads git's list, and this is no checkout"
)
def test_no_committed_file_is_large_or_a_pickle() -> None:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]
    assert [path for path in files if path.suffix in {".pt", ".pth", ".pkl", ".ckpt", ".bag", ".mcap", ".db3"}] == []
    limits = {ROOT / "docs" / "images" / "localization.gif": 3_000_000}
    large = [path for path in files if path.stat().st_size > limits.get(path, 1_000_000)]
    assert [path for path in large if ROOT / "maps" not in path.parents] == []


def test_params_file_is_the_nodes_own_table() -> None:
    from kfloc_ros.nodes.parameters import render_yaml

    assert (ROOT / "config" / "localizer.yaml").read_text(encoding="utf-8") == render_yaml()


def test_dds_profile_holds_several_images() -> None:
    tree = ElementTree.parse(ROOT / "config" / "fastdds.xml")
    spaces = {"dds": "http://www.eprosima.com"}
    image_bytes = 1280 * 720 * 3
    assert int(tree.findtext(".//dds:segment_size", "0", spaces)) >= 8 * image_bytes
    assert int(tree.findtext(".//dds:maxMessageSize", "0", spaces)) > image_bytes


@pytest.mark.ros
@pytest.mark.skipif(importlib.util.find_spec("tf2_msgs") is None, reason="tf2_msgs is not installed; run `make setup`")
def test_tf_message_is_the_official_one() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from setup_steps import TRY_ROS, TYPE_HASH
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    done = subprocess.run([sys.executable, "-c", TRY_ROS], capture_output=True, text=True, timeout=60, check=False)
    assert TYPE_HASH in done.stdout, done.stderr
