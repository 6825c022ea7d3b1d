"""Mechanism: artifacts, stages, the teacher store. Knows no model, loss or task."""
