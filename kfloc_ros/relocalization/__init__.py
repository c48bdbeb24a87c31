# SPDX-License-Identifier: Apache-2.0
"""A pose without a prior: retrieve views, match them, propose hypotheses, weigh their evidence, decide."""
