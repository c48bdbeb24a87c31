# SPDX-License-Identifier: Apache-2.0
"""Direct feature-metric pose alignment after PixLoc (Sarlin et al., CVPR 2021)."""
