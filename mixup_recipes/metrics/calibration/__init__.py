"""Expected calibration error and negative log-likelihood. ``formula`` is plain numpy, ``calibration`` the metric."""
