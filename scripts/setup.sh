#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Selects a suitable Python and runs setup_env.py with it. PYTHON=... gives one; arguments are passed on.
set -eu

here=$(dirname "$0")

fits() {
    "$1" -c 'import sys; sys.exit(not (sys.implementation.name == "cpython" and (3, 10) <= sys.version_info[:2] <= (3, 13)))' \
        >/dev/null 2>&1
}

# If a ROS installation is sourced, its interpreter is preferred; otherwise the version of development.
if [ -n "${PYTHON:-}" ]; then
    candidates=$PYTHON
elif [ -n "${ROS_DISTRO:-}" ] || [ -n "${AMENT_PREFIX_PATH:-}" ]; then
    candidates="python3 python3.12 python3.11 python3.13 python3.10"
else
    candidates="python3.11 python3 python3.12 python3.13 python3.10"
fi

for candidate in $candidates; do
    if fits "$candidate"; then
        exec "$candidate" "$here/setup_env.py" "$@"
    fi
done

if [ -n "${PYTHON:-}" ]; then
    echo "set-up: PYTHON=$PYTHON is not a CPython 3.10, 3.11, 3.12 or 3.13; name one that is, such as PYTHON=python3.11." >&2
else
    echo "set-up: no CPython 3.10 to 3.13 was found, which ROS 2's wheels need; on Debian 12: apt-get install python3 python3-venv python3-dev." >&2
fi
exit 1
