# SPDX-License-Identifier: Apache-2.0
"""Maps: building, storing, checking."""
