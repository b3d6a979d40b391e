"""Pictures and captions: WebDataset shards, evaluation sets, the embedded benchmark; from file to tensor."""
