# SPDX-License-Identifier: Apache-2.0
"""ROS 2 nodes: stages hosted by lifecycle nodes, and the publishers, services and parameters that they use."""
