"""Measurements of each part against its peers on the same machine in the same run (docs/design.md section 9)."""
