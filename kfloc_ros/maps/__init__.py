# SPDX-License-Identifier: Apache-2.0
"""Maps and places: folder format, loading and saving, calibration values, index of a place."""
