"""What is drawn or written from runs: card, report, plots, previews."""
