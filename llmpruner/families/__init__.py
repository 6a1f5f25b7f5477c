"""Model families: coupled groups and text formats, one architecture each."""
