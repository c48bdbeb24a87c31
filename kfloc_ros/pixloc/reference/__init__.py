# SPDX-License-Identifier: Apache-2.0
"""PixLoc as published: networks, cost, solver, refinement."""
