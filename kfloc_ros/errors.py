# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause. Every message is a sentence on what was wrong and what to do."""


class KflocError(Exception):
    """Base of every error raised for the user; the command line prints it without a traceback."""


class ConfigError(KflocError):
    """Error of an unknown configuration key, or of a value of the wrong type or outside its range."""


class WeightsError(KflocError):
    """Error of pretrained weights that are missing or do not have the expected layout."""


class MapError(KflocError):
    """Error of a map folder that is missing, damaged, of a newer version, or unfit for the camera at hand."""


class SourceError(KflocError):
    """Error of a SOURCE (dataset folder or bag) that is missing, ambiguous or damaged."""


class FrameError(KflocError):
    """Error of one unusable frame: wrong size, encoding, intrinsics or time stamp."""


class RosUnavailableError(KflocError):
    """Error of a command that needs ROS 2, which cannot be imported."""


class ReplayError(KflocError):
    """Error of a replay: a node ended or did not come up in time."""


class DrawingError(KflocError):
    """Error of a picture, video, recording or page that cannot be made: no content, a missing package, or no codec."""


class DownloadError(KflocError):
    """Error of a download: no answer, another size or content than listed, or an archive that must not be unpacked."""
