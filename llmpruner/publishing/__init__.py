"""Publishing: a model card from the record of a checkpoint, and sending both to the Hugging Face Hub."""
