"""Variants of batch and switchable normalisation; sn/hooks.py has what they need beyond forward."""
