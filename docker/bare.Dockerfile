# SPDX-License-Identifier: Apache-2.0
# A machine without ROS: Debian 12, ROS 2 from its wheels, x86-64.
#   docker build -f docker/bare.Dockerfile -t kfloc:bare .
#   docker run --rm --shm-size=512m kfloc:bare kfloc demo --quick --out /tmp/demo
FROM debian:12-slim
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
ENV PIP_NO_CACHE_DIR=1
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends ca-certificates cmake g++ git libgl1 libglib2.0-0 make python3-dev \
       python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home robot \
    && install -d -o robot -g robot /kfloc

USER robot
WORKDIR /kfloc
COPY --chown=robot:robot . .
RUN make setup
ENV PATH="/kfloc/.venv/bin:${PATH}" VIRTUAL_ENV=/kfloc/.venv
CMD ["kfloc", "--help"]
