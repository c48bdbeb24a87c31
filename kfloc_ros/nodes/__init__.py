# SPDX-License-Identifier: Apache-2.0
"""The ROS 2 side: components that attach to an rclpy node, and what only they need."""
