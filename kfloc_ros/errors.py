# SPDX-License-Identifier: Apache-2.0
"""Errors that a user can cause. Every message is a sentence on what was wrong and what to do."""


class KflocError(Exception):
    """Base of every error raised for the user; the command line prints it without a traceback."""


class ConfigError(KflocError):
    """A configuration key is unknown, or a value has the wrong type or lies outside its range."""


class WeightsError(KflocError):
    """Pretrained weights are missing or do not have the expected layout."""


class MapError(KflocError):
    """A map folder is missing, damaged, of a newer version, or unfit for the camera at hand."""


class SourceError(KflocError):
    """A SOURCE (dataset folder or bag) is missing, ambiguous or damaged."""


class FrameError(KflocError):
    """One frame is unusable: wrong size, encoding, intrinsics or time stamp."""


class RosUnavailableError(KflocError):
    """ROS 2 is needed for this command and cannot be imported."""


class ReplayError(KflocError):
    """A replay could not be carried out: a node ended or did not come up in time."""


class DrawingError(KflocError):
    """A picture, video, recording or page cannot be made: nothing to show, a missing package, or no codec."""
