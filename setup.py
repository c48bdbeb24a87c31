# SPDX-License-Identifier: Apache-2.0
"""An ament_python package: colcon and pip both build it from here."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

PACKAGE = "kfloc_ros"
ROOT = Path(__file__).resolve().parent


def folder(source: str, *patterns: str) -> list[tuple[str, list[str]]]:
    """The data files of one folder, subfolders included, as setuptools wants them: (destination, files)."""
    found: dict[str, list[str]] = {}
    for pattern in patterns:
        for path in sorted((ROOT / source).rglob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                relative = path.relative_to(ROOT)
                found.setdefault(f"share/{PACKAGE}/{relative.parent}", []).append(str(relative))
    return sorted(found.items())


setup(
    name=PACKAGE,
    version="0.2.0",
    description="Real-time sequential camera relocalization for ROS 2: KFNet's filter, PixLoc's refinement.",
    license="Apache-2.0",
    maintainer="kfloc_ros developers",
    maintainer_email="maintainers@kfloc-ros.org",
    python_requires=">=3.10",
    packages=find_packages(include=[PACKAGE, f"{PACKAGE}.*"]),
    package_data={PACKAGE: ["py.typed", "kfnet/weights/*", "visualization/web/*"]},
    data_files=[
        ("share/ament_index/resource_index/packages", [f"resource/{PACKAGE}"]),
        (f"share/{PACKAGE}", ["package.xml"]),
        *folder("launch", "*.py"),
        *folder("config", "*.yaml", "*.xml"),
        *folder("rviz", "*.rviz", "*.json"),
        *folder("maps", "*"),
    ],
    # What the algorithm imports. ROS 2 is never asked of pip: it is sourced, or set-up brings it.
    install_requires=[
        "matplotlib>=3.6",
        "numba>=0.57",
        "numpy>=1.24",
        "opencv-python-headless>=4.8",
        "poselib>=2.0.4; sys_platform != 'linux' or platform_machine == 'x86_64'",
        "pycolmap>=3.11; sys_platform != 'linux' or platform_machine == 'x86_64'",
        "pyyaml>=6",
        "rosbags>=0.10.11",
        "safetensors>=0.4",
        "setuptools",
        "torch>=2.1",
        "tqdm>=4.64",
    ],
    extras_require={
        "cluster": ["distributed>=2024.1"],
        "heic": ["pillow-heif>=0.18,<2"],
        "notebooks": ["ipykernel>=6", "jupyterlab>=4", "nbclient>=0.8", "nbformat>=5.7"],
        "onnx": ["onnx>=1.15", "onnxruntime>=1.17"],
        "openvino": ["openvino>=2024.1"],
        "simulation": ["embreex>=4.4"],
        "tensorboard": ["tensorboard>=2.15,<3"],
        "test": ["hypothesis>=6.100", "pytest>=7,<9", "pytest-xdist>=3.5,<4"],
        "view": ["rerun-sdk>=0.41,<1"],
    },
    zip_safe=False,
    entry_points={
        "console_scripts": [
            "kfloc = kfloc_ros.cli.main:run",
            "camera_node = kfloc_ros.nodes.executables:camera_node",
            "filter_node = kfloc_ros.nodes.executables:filter_node",
            "refiner_node = kfloc_ros.nodes.executables:refiner_node",
            "localizer = kfloc_ros.nodes.executables:localizer",
        ]
    },
)
