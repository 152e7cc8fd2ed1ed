"""Every way of making a model small, made and measured in one run: `scripts/results` writes docs/results.md of it."""
