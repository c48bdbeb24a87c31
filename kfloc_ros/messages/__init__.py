# SPDX-License-Identifier: Apache-2.0
"""ROS messages to our types and back; imports nothing of ROS."""
