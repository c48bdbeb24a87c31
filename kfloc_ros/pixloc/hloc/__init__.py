# SPDX-License-Identifier: Apache-2.0
"""Files exchanged with hloc, and the published runs over the benchmarks."""
