"""Self-contained HTML pages about models."""
