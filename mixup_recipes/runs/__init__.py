"""Runs after training: a folder opened once, its log, seeds, comparisons, records, sweeps."""
