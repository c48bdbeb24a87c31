# SPDX-License-Identifier: Apache-2.0
"""Published PixLoc: networks, cost, solver, refinement."""
