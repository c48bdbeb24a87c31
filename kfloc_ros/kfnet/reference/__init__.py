# SPDX-License-Identifier: Apache-2.0
"""KFNet's published networks: the `reference` family, an alternative to the fast one behind the same filter."""
