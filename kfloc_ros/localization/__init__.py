# SPDX-License-Identifier: Apache-2.0
"""Localization as a robot runs it: frames to poses, in one map or in a place of several maps."""
