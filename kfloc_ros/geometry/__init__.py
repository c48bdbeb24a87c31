# SPDX-License-Identifier: Apache-2.0
"""Cameras, poses and the Lie maps."""
