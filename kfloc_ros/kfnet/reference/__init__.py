# SPDX-License-Identifier: Apache-2.0
"""KFNet's networks as published: the `reference` family, beside the fast one and behind the same filter."""
