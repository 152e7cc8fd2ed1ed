"""What crosses a process boundary: releases, manifests, messages, topics, errors, digests, signing.

Invariant: nothing in this package performs I/O, reads a clock or keeps state; it depends on nothing of ours.
"""
