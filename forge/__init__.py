"""The producer: import, quantise, judge, pack and sign. Runs on an operator's machine, never on a node."""
