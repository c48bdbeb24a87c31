# SPDX-License-Identifier: Apache-2.0
"""Training, one module per thing trained."""
