# SPDX-License-Identifier: Apache-2.0
"""Image features: the backbone and the LightGlue matcher."""
