# SPDX-License-Identifier: Apache-2.0
"""Addresses of public data sets and weights, where they belong, and what is known of their sizes and terms.

Addresses are those of PixLoc's download script, of KFNet's README and of the data sets' own pages. A size or checksum
is listed only where it was published; the others are taken from the server.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from kfloc_ros.errors import DownloadError

DATA, HLOC, TRAINING = "data", "hloc", "training"
"""Roots of the layout: images and ground truth; models, lists and pairs of hloc; weights and training runs."""

CMU_TEST_SLICES = tuple(str(n) for n in (*range(2, 7), *range(13, 22)))
CMU_TRAINING_SLICES = tuple(str(n) for n in (*range(8, 13), *range(22, 26)))

_PIXLOC = "https://cvg-data.inf.ethz.ch/pixloc_CVPR2021/"
_SEVEN_SCENES = "https://download.microsoft.com/download/2/8/5/28564B23-0828-408F-8631-23B1EFF1DAC8/"
_CAMBRIDGE = "https://www.repository.cam.ac.uk/bitstream/handle/1810/"
_VISLOC = "https://data.ciirc.cvut.cz/public/projects/2020VisualLocalization/"


@dataclass(frozen=True)
class Asset:
    """One file, or one folder that the server lists."""

    address: str
    folder: str
    """Folder below the root, in which the file, or the content of the archive, is put."""
    root: str = DATA
    part: str = ""
    """Scene or slice; empty for what all parts need."""
    size_bytes: int | None = None
    """Exact size, if it was published."""
    about_bytes: int | None = None
    """Approximate size for the user, if only that was published."""
    sha256: str = ""
    file_name: str = ""
    """Name of the file, if the address has none."""
    training: bool = False
    """True for what only training needs."""
    exclude: tuple[str, ...] = ()
    """Folders of a listing that are left out."""
    unpack: str = ""
    """Pattern of the archives in a listing, or within the archive, that are unpacked, too."""

    @property
    def is_listing(self) -> bool:
        """True for a folder that the server lists."""
        return self.address.endswith("/")

    @property
    def name(self) -> str:
        """Name of the file; of a folder, its last two parts."""
        path = urlsplit(self.address).path
        return self.file_name or ("/".join(path.split("/")[-3:]) if self.is_listing else path.rsplit("/", 1)[-1])


@dataclass(frozen=True)
class Collection:
    """What ``--select`` names."""

    text: str
    terms: str
    """Licence as far as its page or README states it."""
    page: str
    """Page with the terms in force."""
    assets: tuple[Asset, ...]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of its scenes or slices."""
        return tuple(dict.fromkeys(asset.part for asset in self.assets if asset.part))


def _drive(identifier: str, file_name: str, folder: str, **rest: object) -> Asset:
    """Return a file of Google Drive, with the confirmation that large files need."""
    address = f"https://drive.usercontent.google.com/download?id={identifier}&export=download&confirm=t"
    return replace(Asset(address, folder, file_name=file_name), **rest)  # type: ignore[arg-type]


_SEVEN_FILES = {  # bytes and SHA-256 of the archives
    "chess": (3_079_608_937, "d00b5b8f904123ec136768ee0ebd8f72aebb5473630fb5d8ec352e70ae4859d0"),
    "fire": (2_301_204_154, "735d577f471a116b3f190f9bd79026b7fccfc6dee220473499bdb2b93efd1955"),
    "heads": (956_332_240, "402f8760ba150100bda5360241b605383dc5f949c055863301bde1b45f6a7a5d"),
    "office": (4_707_873_861, "c2bd101aae86c926d43ed92e080140b2e32d54ce14a5ce289b9aeca3472e7744"),
    "pumpkin": (2_890_874_911, "53fd1cb4c2f50378abc112f48e8897138e2135f2848c8c2e094e8028af07a65f"),
    "redkitchen": (6_141_181_406, "55f6aeabfd8308fbe02a6f37d1dbdbc4c087c3c6c84cb5fae062a90c43ffcba6"),
    "stairs": (1_496_412_431, "3521a1a26acb98321918ec352f8b189d301c2e3cce2de1bf2eac424d003b3929"),
}
_TWELVE_FILES = {  # bytes
    "apt1": 1_489_122_810,
    "apt2": 3_001_378_406,
    "office1": 6_298_846_857,
    "office2": 1_849_269_665,
}
_CAMBRIDGE_HANDLES = {
    "KingsCollege": "251342", "GreatCourt": "251291", "OldHospital": "251340", "ShopFacade": "251336",
    "StMarysChurch": "251294",
}  # fmt: skip
_LABELS = {  # Google Drive identifier and gigabytes
    "chess": ("15LCNv8cZkg1tINggssB--MWDGxE3LoYq", 13),
    "fire": ("1EaVPg_-6gp_7PWvsiHk05QHU425t5dql", 9),
    "heads": ("1aYJPdekYuofNcqdsLNdphzCVVX93zT1w", 4),
    "office": ("16hMHwI8dnWEmt0HoevfQxNsnyO7ND6Nb", 22),
    "pumpkin": ("1elobB_maZ5tW1v_K3Anl9BGGlnkCKI8e", 13),
    "redkitchen": ("1j5UG23me1Z8Sz9PBCeTNeZsw3mSeUTtS", 27),
    "stairs": ("1Hv9bOsf68xNyaOJqpnOKHKcv9YYXroLj", 7),
}
_SEEN_ON_PAGE = "terms of its page"
_ACADEMIC = "CC BY-NC-SA 4.0, for academic use"

COLLECTIONS: Mapping[str, Collection] = {
    "7Scenes": Collection(
        "7-Scenes: colour, depth, poses; SfM poses; PixLoc's models and pairs",
        f"Microsoft Research, {_SEEN_ON_PAGE}",
        "https://www.microsoft.com/en-us/research/project/rgb-d-dataset-7-scenes/",
        (
            *(
                Asset(f"{_SEVEN_SCENES}{scene}.zip", "7Scenes", part=scene, size_bytes=size, sha256=digest,
                      unpack=f"{scene}/*.zip")
                for scene, (size, digest) in _SEVEN_FILES.items()
            ),
            _drive("1cu6KUR7WHO7G4EO49Qi3HEKU6n_yYDjb", "7scenes_sfm_triangulated.zip", "7Scenes"),
            Asset(f"{_PIXLOC}7Scenes/", "7Scenes", HLOC),
        ),
    ),
    "12Scenes": Collection(
        "12-Scenes: colour, depth, poses",
        f"Stanford Computer Graphics Laboratory, {_SEEN_ON_PAGE}",
        "https://graphics.stanford.edu/projects/reloc/",
        tuple(
            Asset(f"https://graphics.stanford.edu/projects/reloc/data/{part}.zip", "12Scenes", part=part,
                  size_bytes=size, unpack=f"{part}/*.zip")
            for part, size in _TWELVE_FILES.items()
        ),
    ),
    "Cambridge": Collection(
        "Cambridge Landmarks: images and poses; SfM models; PixLoc's models and pairs",
        f"University of Cambridge, {_SEEN_ON_PAGE}",
        "https://www.repository.cam.ac.uk/handle/1810/251342",
        (
            *(
                Asset(f"{_CAMBRIDGE}{handle}/{scene}.zip", "Cambridge", part=scene)
                for scene, handle in _CAMBRIDGE_HANDLES.items()
            ),
            _drive(
                "1esqzZ1zEQlzZVic-H32V6kkZvc4NeS15", "CambridgeLandmarks_Colmap_Retriangulated_1024px.zip", "Cambridge"
            ),
            Asset(f"{_PIXLOC}Cambridge-Landmarks/", "Cambridge", HLOC),
        ),
    ),
    "Aachen": Collection(
        "Aachen Day-Night: images and queries; PixLoc's models and pairs",
        _ACADEMIC,
        "https://www.visuallocalization.net/datasets/",
        (
            Asset(f"{_VISLOC}Aachen-Day-Night/queries/", "Aachen/queries"),
            Asset(f"{_VISLOC}Aachen-Day-Night/images/", "Aachen/images", unpack="database_and_query_images.zip"),
            Asset(f"{_PIXLOC}Aachen-Day-Night/", "Aachen", HLOC),
        ),
    ),
    "CMU": Collection(
        "Extended CMU Seasons by slice; PixLoc's models and pairs; with --training its training split",
        f"Extended CMU Seasons, {_SEEN_ON_PAGE}",
        "https://www.visuallocalization.net/datasets/",
        (
            *(Asset(f"{_VISLOC}Extended-CMU-Seasons/slice{n}.tar", "CMU", part=n) for n in CMU_TEST_SLICES),
            *(
                Asset(f"{_VISLOC}Extended-CMU-Seasons/slice{n}.tar", "CMU", part=n, training=True)
                for n in CMU_TRAINING_SLICES
            ),
            *(Asset(f"{_PIXLOC}Extended-CMU-Seasons/slice{n}/", f"CMU/slice{n}", HLOC, n) for n in CMU_TEST_SLICES),
            Asset(f"{_PIXLOC}training/cmu_pixloc_training.tar.gz", "", training=True),
        ),
    ),
    "RobotCar": Collection(
        "RobotCar Seasons: images and queries; PixLoc's models and pairs",
        f"RobotCar Seasons, {_SEEN_ON_PAGE}",
        "https://www.visuallocalization.net/datasets/",
        (
            Asset(f"{_VISLOC}RobotCar-Seasons/", "RobotCar", exclude=("3D-models",), unpack="images/*.zip"),
            Asset(f"{_PIXLOC}RobotCar-Seasons/", "RobotCar", HLOC),
        ),
    ),
    "MegaDepth": Collection(
        "MegaDepth: PixLoc's training data, with --training (the images: by hand, from D2-Net's page)",
        f"MegaDepth, {_SEEN_ON_PAGE}",
        "https://github.com/mihaidusmanu/d2-net",
        (Asset(f"{_PIXLOC}training/megadepth_pixloc_training.tar.gz", "", training=True),),
    ),
    "checkpoints": Collection(
        "PixLoc's weights, pixloc_cmu and pixloc_megadepth, for `kfloc convert`",
        f"Apache-2.0 for the code that made them, {_SEEN_ON_PAGE}",
        "https://github.com/cvg/pixloc",
        (Asset(f"{_PIXLOC}checkpoints/", "", TRAINING),),
    ),
    "labels": Collection(
        "KFNet's label maps of 7-Scenes",
        f"derived from 7-Scenes, {_SEEN_ON_PAGE}",
        "https://github.com/zlthinker/KFNet",
        tuple(
            _drive(identifier, f"{scene}.zip", f"KFNet/{scene}", part=scene, about_bytes=size * 10**9)
            for scene, (identifier, size) in _LABELS.items()
        ),
    ),
    "kfnet": Collection(
        "KFNet's weights for 7-Scenes, for `kfloc convert`",
        f"MIT for the code that made them, {_SEEN_ON_PAGE}",
        "https://github.com/zlthinker/KFNet",
        (
            _drive(
                "13KZGz_akJw8iTQW90pgbuw2JAQzV7cG8", "kfnet_models.zip", "kfnet", root=TRAINING, about_bytes=3 * 10**9
            ),
        ),
    ),
}  # fmt: skip


def assets_of(
    name: str, *, parts: Sequence[str] = (), training: bool = False, roots: Sequence[str] = (DATA, HLOC, TRAINING)
) -> tuple[Asset, ...]:
    """Return what is to be downloaded of a collection.

    Args:
        name: key of :data:`COLLECTIONS`.
        parts: scenes or slices; all if empty. What all parts need always comes along.
        training: include what only training needs.
        roots: roots of the layout to include.

    Raises:
        DownloadError: the collection has no such part, or nothing is left of it.
    """
    collection = COLLECTIONS[name]
    if unknown := [part for part in parts if part not in collection.parts]:
        known = ", ".join(collection.parts) or "none, it is one piece"
        raise DownloadError(f"'{name}' has no part '{unknown[0]}'; it has: {known}.")
    chosen = tuple(
        asset
        for asset in collection.assets
        if asset.root in roots
        and (not parts or not asset.part or asset.part in parts)
        and (training or not asset.training or asset.part in parts)
    )
    if not chosen:
        hint = " Pass --training." if any(asset.training for asset in collection.assets) and not training else ""
        raise DownloadError(f"Nothing of '{name}' is selected.{hint}")
    return chosen


def mirrored(address: str, mirror: str) -> str:
    """Return an address at a mirror, which holds the files below the names of their hosts."""
    place = urlsplit(address)
    query = f"?{place.query}" if place.query else ""
    return f"{mirror.rstrip('/')}/{place.netloc}{place.path}{query}" if mirror else address
