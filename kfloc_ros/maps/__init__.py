# SPDX-License-Identifier: Apache-2.0
"""What a map is: the folder format, loading and saving, calibration values, places and their index."""
