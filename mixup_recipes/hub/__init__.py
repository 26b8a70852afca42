"""Publishing runs on the Hub, and holding a repository to what it says."""
