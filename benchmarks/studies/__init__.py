# SPDX-License-Identifier: Apache-2.0
"""Studies that only the benchmarks run: disturbances, recovery, paired tests, parity, reference networks."""
