"""The plugin packages that ``llmpruner new-plugin`` writes, with tests."""
