# SPDX-License-Identifier: Apache-2.0
"""Scene coordinates, their optical flow and their Kalman filter, after KFNet (Zhou et al., CVPR 2020)."""
