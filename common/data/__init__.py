"""Pictures and captions: WebDataset shards, evaluation sets, the embedded benchmark, and transforms from file to tensor."""
