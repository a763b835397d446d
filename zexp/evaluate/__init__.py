"""Scoring of states by lm-eval: which tasks there are, their documents, the adapter, the results.

plan, definitions, names and builders are pure: `zexp plan` imports them without torch, lm_eval or datasets.
"""
