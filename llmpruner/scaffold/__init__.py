"""What ``llmpruner new-plugin`` writes: a package of its own with a family, its tests and its CI."""
