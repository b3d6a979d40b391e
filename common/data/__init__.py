"""Pictures and captions: WebDataset shards, the embedded benchmark, and transforms from file to tensor."""
