"""Model families: the structure and the text format of one architecture each."""
