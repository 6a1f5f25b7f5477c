"""Running a decoder layer by layer, and measuring what happens in it."""
