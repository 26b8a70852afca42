"""A page to try mixers on photos, and a page of a trained classifier for a Space."""
