# SPDX-License-Identifier: Apache-2.0
"""Maps: building, calibration, updating, merging, and export."""
