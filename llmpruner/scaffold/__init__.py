"""Packages that ``llmpruner new-plugin`` writes: a family, criterion or strategy with its tests and CI."""
