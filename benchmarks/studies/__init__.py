# SPDX-License-Identifier: Apache-2.0
"""Studies for the benchmarks: disturbances, recovery, paired tests, parity, reference networks."""
