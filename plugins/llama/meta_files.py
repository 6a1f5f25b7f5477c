"""Names of the files in Meta's official format."""

PARAMS = "params.json"
SHARDS = "consolidated.*.pth"
TOKENIZER = "tokenizer.model"
