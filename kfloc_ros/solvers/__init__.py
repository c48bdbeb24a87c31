# SPDX-License-Identifier: Apache-2.0
"""Pose from 2-D to 3-D correspondences."""
