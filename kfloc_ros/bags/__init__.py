# SPDX-License-Identifier: Apache-2.0
"""Rosbag2 recordings, written and read without ROS."""
