"""What is generated from runs: tables, curves, cards. Nothing here is typed by hand."""
