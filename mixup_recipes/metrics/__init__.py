"""`evaluate` metrics: top-k accuracy and calibration. Each folder loads by path and is a Space of its own."""
