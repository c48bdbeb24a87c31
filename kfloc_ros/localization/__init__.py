# SPDX-License-Identifier: Apache-2.0
"""What a robot runs: frames to poses, in one map or in a place of several."""
