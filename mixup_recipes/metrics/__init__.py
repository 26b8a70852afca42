"""`evaluate` metrics: top-k accuracy and calibration. Each folder loads by path and is a Space of its own.

``multi_label`` is a formula alone.
"""
