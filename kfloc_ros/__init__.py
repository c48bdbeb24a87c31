# SPDX-License-Identifier: Apache-2.0
"""Real-time sequential camera relocalization: measure, filter, refine."""

import os as _os

__version__ = "0.2.0"

# OpenMP's threads wait for each other at every layer, by default in a loop that keeps a core busy. On a robot, whose
# cores have other work, the thread waited for may not be running, and a frame then takes up to fifty times as long.
# Sleeping instead costs a tenth to a third more on an idle machine. Read once, when torch is loaded; a set variable
# is respected.
_os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# An image file of a megabyte may announce a thousand times as many pixels. OpenCV refuses more than this before it
# takes memory for them; read once, when OpenCV is loaded.
_os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", "64000000")
