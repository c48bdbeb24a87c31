# SPDX-License-Identifier: Apache-2.0
"""Relocalization, a pose without a prior: retrieve views, match, propose hypotheses, weigh the evidence, decide."""
