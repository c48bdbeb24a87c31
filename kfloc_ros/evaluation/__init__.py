# SPDX-License-Identifier: Apache-2.0
"""Evaluation: metrics, records, summaries, reports, offline runs."""
