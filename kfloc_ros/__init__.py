# SPDX-License-Identifier: Apache-2.0
"""Real-time sequential camera relocalization: measure, filter, refine."""

__version__ = "0.1.0"
